"""An experiment over arms and seeds: which steps are run, and one result out of all evaluations.

Begin with arms: the list of arms and comparisons, pure data. ladder plans every step of every arm once,
ladder_options reads the words of its command, ladder_run runs what is missing, results makes one result from the
seeds' scores, and ladder_result declares the file that holds it.

Words: an arm is one way to train, with the settings in which it differs; a ladder is the whole experiment, one folder
with a run per arm and seed. An arm's name is a model's name in eval. May import runs and evaluation; to it a step is a
command, and it knows no model.
"""
