"""What both engines share of a model: its tokenizer, weights, attention, log-probs and size.

A row is a line of tokens in a batch, and several items may share one. A layout says which item and which segment each
token belongs to. generation/ and training/ use the same words, and planning/ the same sizes and shapes.

Begin with codec (text to token ids) and logprobs (the log-prob of every response token of a Batch).
Text: codec; turn (where an answer begins and ends, thoughts), chat_template (rendering within limits).
Files: architecture (which class opens a folder), loaded_weights (whether it holds all weights), model_folder (load,
export), lora (adapters), stop_tokens (what ends a text), export_checks, random_model (a tiny model to start from).
Computing: rows (token rows as tensors), attention (who sees whom), fused_head (log-probs without all logits),
model_checks (padding, causality and KV cache of a live model).
Without torch: sizes (blocks, rows, padding), shape, known_shapes (widths, parameters), worker_memory (its formulas).

It knows neither sampling nor training: no losses, optimizers, wordings or rewards. generation/ and training/
import it and never each other.
"""
