"""Consistency alignment: make a language model answer the same however you ask.

The files directly in this folder are the ground floor, which every package may import and which imports none:

errors          the one exception of our own, for what a user can fix
steps           the eight steps by name, and which of them train, generate or repeat by round
tables          what a table of the configuration is made of
model_tables    [model] and the tables inside it
training_tables [train], [sft] and [align]
config          the configuration: one class per table, every key with its unit and meaning
config_values   its values as flat keys
files           files that people name, opened for reading: any failure is one line
commandline     from the words of a command to a checked configuration
recipe          the process around a recipe: exit status, logging, commands it runs
failures        what is said of an error that the machine has caused: memory, disks
process         this process: ranks, nodes, seeds, preemption
limited_call    a call with limits on time and memory, for code that comes with a model
display         texts as a terminal or Markdown may show them
records         what steps hand to one another, as JSON lines
prompts         every text shown to a model besides the data
answer_form     when two answers are equal
text            when two inputs are equal; words in any script, hashes

The packages are built on it; the docstring of each lists its modules. docs/architecture.md says which may import which.
"""

__version__ = "0.3.0"
