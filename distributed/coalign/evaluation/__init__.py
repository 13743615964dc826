"""What eval asks and what the answers are worth; CR, accuracy and their intervals; the form of metrics.json.

Begin with summary: it turns responses (grids, metrics) into the content of metrics.json, with means and paired
differences (estimates, intervals), rows by task, wording and input (result_rows) and inputs to look at (cases).
requests and tested_models say what is asked of which models, agreement when two answers mean the same.
metrics_schema and metrics_rows declare metrics.json field by field, metrics_file writes and reads it, and typed_json
checks any declared form. scores reads scores.jsonl of one or several runs.

Words: an input is an Example of records, a pair is an input under one wording, a set is all, seen or unseen tasks. The
files of the step are in runs/. May import runs, wordings and judging; knows no engine and no model, only their answers.
"""
