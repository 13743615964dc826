"""Tiny tensors gain nothing from threads, and lose much when other tests run beside them."""

import torch

torch.set_num_threads(1)
