"""Ways to ask for a task: where wordings come from, which of them stay, and how one becomes a request to a model.

wordings        rendering prompts, mapping answers there and back, splits into train, dev and test
wording_files   wordings written by people, read from JSONL and checked
extraction      the rewrite in a model's answer, without what is around it: tags, fences and tokens by wrappings
rewrites        a model's rewrites of an instruction: requests, checks
languages       whether two texts are in the same script and language
patterns        regular expressions of wordings files, within limits of size and time
near_repeats    texts that nearly repeat one another
filtering       which wordings a task keeps, and the reason for each that is dropped
asking          inputs under wordings as requests, generated texts as responses; what exceeds the context

An answer in *canonical* words is the task's own; under a wording it may have other words (its answer map). A wording is
called *instruction* in prompts and *prefix* or *template* in files. Everything here is a pure function of texts and
token ids: no model and no folder of a run. Begin with wordings, then filtering.settle and asking.
"""
