"""Instruction data in: read the sources, deal inputs out to sft, align, dev and test, count what came of it (prepare).

`sources` finds and reads files of every kind; what needs the datasets library is in `hugging_face`. `instances` turns
one row, message list or task file into an `Instance`, or says what is wrong with it. `spool` keeps millions of rows on
disk, to be read like a list. `task_names` finds the tasks that a key names, `answer_forms` what counts when a task's
answers are compared. `splits` merges repeats, finds label tasks, splits and limits. `inventory` counts the result.

Words: an instance is a row as its source has it; after prepare it is an example (records.Example), whose text is the
input. A task is one instruction with its instances; other packages add wordings, further ways to ask for a task. What
is left out comes back as a `DroppedInstance` with its reason. This package may not know models, tokens or wordings.
Begin with `sources.read_sources`, then `splits.split_instances`.
"""
