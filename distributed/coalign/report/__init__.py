"""What people read: lines on the terminal, the HTML page of a run, the page that compares runs, model cards, tables.

Begin with terminal for plain lines, or with page for the HTML page. page fills the templates with sentences, figures,
case_tables (inputs one by one), wording_tables and data_stories; run_history finds what the run's steps have left on
disk. figures chooses the pictures, charts draws them, svg is the canvas under them. comparison sets runs side by side.
model_cards writes the card of an exported model, model_card_results puts results into it. experiment_table shows a
ladder. formatting holds what they share: numbers, intervals, names of metrics and of sets of tasks.

Words: a case is an input shown with its answers; a label is what a model is called here, its name in eval.models
elsewhere. May import runs, evaluation and experiment; computes nothing that would change a result, loads no model.
"""
