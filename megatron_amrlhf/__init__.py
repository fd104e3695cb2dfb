"""Adaptive Message-wise RLHF on Megatron stages under a shared DeepSpeed ZeRO-3 engine."""
