"""Imported once by the server that all ranks of the tests are forked from."""

import gc

import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2

import megatron_amrlhf.commands.train
import megatron_amrlhf.report.plots

gc.collect()
gc.freeze()  # DeepSpeed collects at each start, and would go through all of this
