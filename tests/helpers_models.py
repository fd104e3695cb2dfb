"""Small Hugging Face models for tests: random ones, and SmolLM2 dressed as a Qwen2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
END_TOKEN_ID = SPECIAL.index("<|im_end|>")
NUM_CHARACTERS = 96  # newline and printable ASCII


def make_tiny_model(
    folder: str | Path,
    family: str = "qwen2",
    tied: bool = False,
    seed: int = 0,
    *,
    vocab_size: int = 131,
    hidden: int = 48,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 8,
    intermediate: int = 80,
    layers: int = 4,
    rope: dict | None = None,
    max_positions: int = 512,
    weight_std: float = 0.2,
    qkv_bias_std: float = 0.5,
) -> PreTrainedModel:
    """Saves a random float32 model, and a character tokenizer if the vocabulary holds one.

    Every parameter is drawn anew, biases and norms too, so that a test sees each of them.

    Args:
        folder: where to save; made if absent.
        family: ``model_type``: qwen2 (with q/k/v biases), llama, mistral or qwen3 (q/k norms).
        tied: one matrix for the embedding and the output layer.
        rope: ``rope_parameters``; None for plain rotary positions of base 10000.
        seed: of the weights; the global random state is left alone.
        weight_std: standard deviation of matrices (and of norm weights around 1).
        qkv_bias_std: standard deviation of the q/k/v biases of ``qwen2``; 0 for zero biases.

    Returns:
        The model, in eval mode.
    """
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0} | (rope or {}),
        **({"sliding_window": None} if family == "mistral" else {}),
        max_position_embeddings=max_positions,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=END_TOKEN_ID,
        pad_token_id=END_TOKEN_ID,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(".bias"):
                parameter.copy_(qkv_bias_std * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1.0 + weight_std * noise)
            else:
                parameter.copy_(weight_std * noise)
    model.save_pretrained(folder)
    if vocab_size >= len(SPECIAL) + NUM_CHARACTERS:
        tiny_tokenizer(vocab_size).save_pretrained(folder)
    return model


def tiny_tokenizer(vocab_size: int = 131) -> PreTrainedTokenizerFast:
    """One token a character (newline, printable ASCII, then Chinese ones), with ChatML.

    The end token is ``<|im_end|>``, id 2.
    """
    characters = ["\n", *map(chr, range(32, 127))]
    num_filler = vocab_size - len(SPECIAL) - len(characters)
    characters += [chr(0x4E00 + i) for i in range(num_filler)]
    vocabulary = {token: i for i, token in enumerate(SPECIAL + characters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def llama_folder_as_qwen2(src: str | Path, dst: str | Path) -> Path:
    """Copies a Llama folder as the Qwen2 model that computes the same: q/k/v biases of zero.

    The source must hold one ``model.safetensors``. Returns ``dst``.
    """
    src, dst = Path(src), Path(dst)
    shutil.copytree(src, dst)
    config = json.loads((src / "config.json").read_text())
    config.update(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    for key in ("attention_bias", "mlp_bias", "pretraining_tp"):
        config.pop(key, None)
    (dst / "config.json").write_text(json.dumps(config, indent=2))
    weights = load_file(src / "model.safetensors")
    projections = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    for name in [name for name in weights if name.endswith(projections)]:
        weights[name.replace(".weight", ".bias")] = torch.zeros_like(weights[name][:, 0])
    save_file(weights, dst / "model.safetensors", metadata={"format": "pt"})
    return dst
