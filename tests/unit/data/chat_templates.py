"""Chat templates of the shapes that public models have, each in a few words of our own."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<pad> <s> </s> <|im_start|> <|im_end|> <|endoftext|> <|bot|> <|head|> <|/head|> <|eot|> "
    "<eos> <turn> </turn> <|user|> <|assistant|> <|end|> [INST] [/INST] <think> </think>"
).split()


def chat_tokenizer(
    template: str | dict | None, eos: str | None = "</s>", bos: str | None = None
) -> PreTrainedTokenizerFast:
    """A token for each byte and each special token; one with a BOS puts it before texts."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        bos_token=bos,
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class Shape:
    """A template and what it has to be seen as.

    Attributes:
        template: Jinja's text.
        prompt: of the question "Q?".
        end: the token that given answers end with.
        eos: the tokenizer's.
        bos: as this; None: it has none.
        notes: a piece of each sentence that a user is told, in their order.
        system: the prompt of "Q?" with the system message "S"; None: that is refused.
    """

    template: str
    prompt: str
    end: str
    system: str | None
    eos: str = "</s>"
    bos: str | None = None
    notes: tuple[str, ...] = ()


def _turns(body: str, header: str = "", before: str = "", role: str = "m.role") -> str:
    """A template of the usual build: each message alike, then the header."""
    ask = f"{{% if add_generation_prompt %}}{{{{ {header} }}}}{{% endif %}}" if header else ""
    loop = f"{{% for m in messages %}}{{% set r = {role} %}}{{{{ {body} }}}}{{% endfor %}}"
    return before + loop + ask


_CHATML = "'<|im_start|>' + r + '\\n' + m.content + '<|im_end|>\\n'"
_CHATML_ASK = "'<|im_start|>assistant\\n'"
_CHATML_PROMPT = "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n"
_CHATML_SYSTEM = "<|im_start|>system\nS<|im_end|>\n" + _CHATML_PROMPT
_HEADS = "'<|head|>' + r + '<|/head|>\\n\\n' + (m.content | trim) + '<|eot|>'"
_HEADS_ASK = "'<|head|>assistant<|/head|>\\n\\n'"
_HEADS_PROMPT = "<|head|>user<|/head|>\n\nQ?<|eot|><|head|>assistant<|/head|>\n\n"
_NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
)
_SYSTEM_ASIDE = (
    "{% set ns = namespace(s='') %}{% for m in messages if m.role == 'system' %}"
    "{% set ns.s = m.content + '\\n\\n' %}{% endfor %}"
)

SHAPES = {
    "chatml": Shape(
        _turns(_CHATML, _CHATML_ASK), _CHATML_PROMPT, "<|im_end|>", _CHATML_SYSTEM, eos="<|im_end|>"
    ),
    "chatml of a base folder": Shape(
        _turns(_CHATML, _CHATML_ASK),
        _CHATML_PROMPT,
        "<|im_end|>",
        _CHATML_SYSTEM,
        eos="<|endoftext|>",
        notes=("ends turns with '<|im_end|>', the tokenizer's EOS is '<|endoftext|>'",),
    ),
    "default system text": Shape(
        _turns(
            _CHATML,
            _CHATML_ASK,
            "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n"
            "{% endif %}",
        ),
        "<|im_start|>system\nBe good.<|im_end|>\n" + _CHATML_PROMPT,
        "<|im_end|>",
        _CHATML_SYSTEM,
        eos="<|im_end|>",
        notes=(
            "of its own before a prompt without a system message: '<|im_start|>system\\nBe good.",
        ),
    ),
    "llama 3": Shape(
        _turns(_HEADS, _HEADS_ASK, "{{ bos_token }}"),
        "<|bot|>" + _HEADS_PROMPT,
        "<|eot|>",
        "<|bot|><|head|>system<|/head|>\n\nS<|eot|>" + _HEADS_PROMPT,
        eos="<|eot|>",
        bos="<|bot|>",
    ),
    "mistral": Shape(
        "{{ bos_token }}" + _SYSTEM_ASIDE + "{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + (ns.s if loop.last else '') + m.content }}"
        "{{ '[/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] Q?[/INST]",
        "</s>",
        "<s>[INST] S\n\nQ?[/INST]",
        bos="<s>",
    ),
    "mistral with a blank": Shape(
        "{{ bos_token }}" + _NO_SYSTEM + "{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "<s>[INST] Q? [/INST]",
        "</s>",
        None,
        bos="<s>",
        notes=("opens the assistant's turn with '' in prompts, and with ' ' where",),
    ),
    "gemma": Shape(
        "{{ bos_token }}"
        + _NO_SYSTEM
        + _turns(
            "'<turn>' + r + '\\n' + (m.content | trim) + '</turn>\\n'",
            "'<turn>model\\n'",
            role="'model' if m.role == 'assistant' else m.role",
        ),
        "<s><turn>user\nQ?</turn>\n<turn>model\n",
        "</turn>",
        None,
        eos="<eos>",
        bos="<s>",
        notes=("ends turns with '</turn>', the tokenizer's EOS is '<eos>'",),
    ),
    "zephyr": Shape(
        _turns("'<|' + r + '|>\\n' + m.content + eos_token + '\\n'", "'<|assistant|>\\n'"),
        "<|user|>\nQ?</s>\n<|assistant|>\n",
        "</s>",
        "<|system|>\nS</s>\n<|user|>\nQ?</s>\n<|assistant|>\n",
    ),
    "r1 with think": Shape(
        "{{ bos_token }}"
        + _SYSTEM_ASIDE
        + "{{ ns.s }}{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
        "{{ '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}",
        "<s><|user|>Q?<|assistant|><think>\n",
        "</s>",
        "<s>S\n\n<|user|>Q?<|assistant|><think>\n",
        bos="<s>",
        notes=("opens the assistant's turn with '<think>\\n' in prompts, and with '' where",),
    ),
    "qwen 3": Shape(
        _turns(
            "'<|im_start|>' + r + '\\n' + "
            "('<think>\\n\\n</think>\\n\\n' if loop.last and r == 'assistant' "
            "else '') + m.content.split('</think>')[-1] + '<|im_end|>\\n'",
            _CHATML_ASK,
        ),
        _CHATML_PROMPT,
        "<|im_end|>",
        _CHATML_SYSTEM,
        eos="<|im_end|>",
        notes=("with '' in prompts, and with '<think>\\n\\n</think>\\n\\n' where",),
    ),
    "phi": Shape(
        _turns("'<|' + r + '|>\\n' + m.content + '<|end|>\\n'")
        + "{{ '<|assistant|>\\n' if add_generation_prompt else eos_token }}",
        "<|user|>\nQ?<|end|>\n<|assistant|>\n",
        "<|end|>",
        "<|system|>\nS<|end|>\n<|user|>\nQ?<|end|>\n<|assistant|>\n",
        eos="<|endoftext|>",
        notes=("ends turns with '<|end|>', the tokenizer's EOS is '<|endoftext|>'",),
    ),
    "a list of parts": Shape(
        _turns(
            "'<|im_start|>' + r + '\\n' + (m.content | selectattr('type', 'eq', 'text') "
            "| map(attribute='text') | join) + '<|im_end|>\\n'",
            _CHATML_ASK,
        ),
        _CHATML_PROMPT,
        "<|im_end|>",
        _CHATML_SYSTEM,
        eos="<|im_end|>",
    ),
    "a list of parts, silently": Shape(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% for part in m.content %}"
        "{{ part['text'] }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        _CHATML_PROMPT,
        "<|im_end|>",
        _CHATML_SYSTEM,
        eos="<|im_end|>",
    ),
    "no header": Shape(
        _turns(_CHATML),
        _CHATML_PROMPT,
        "<|im_end|>",
        _CHATML_SYSTEM,
        eos="<|im_end|>",
        notes=("no add_generation_prompt: '<|im_start|>assistant\\n' is put behind each prompt",),
    ),
    "no header, in words": Shape(
        _turns("r + ': ' + m.content + (eos_token if r == 'assistant' else '\\n')"),
        "user: Q?\nassistant:",
        "</s>",
        "system: S\nuser: Q?\nassistant:",
        notes=("'assistant:' is put behind each prompt", "with '' in prompts, and with ' ' where"),
    ),
    "the header always": Shape(
        _turns(_CHATML) + "<|im_start|>assistant\n",  # Jinja drops this newline
        _CHATML_PROMPT,
        "<|im_end|>",
        _CHATML_SYSTEM,
        eos="<|im_end|>",
        notes=("'\\n' is put behind each prompt",),
    ),
    "no end after the last turn": Shape(
        _turns(
            "'<|im_start|>' + r + '\\n' + m.content + ('' if loop.last and r == 'assistant' else "
            "'<|im_end|>\\n')",
            _CHATML_ASK,
        ),
        _CHATML_PROMPT,
        "<|im_end|>",
        _CHATML_SYSTEM,
        eos="<|endoftext|>",
        notes=("ends turns with '<|im_end|>', the tokenizer's EOS is '<|endoftext|>'",),
    ),
    "white space changed": Shape(
        _turns(
            "'<|' + r + '|>' + (m.content.split() | join(' ')) + eos_token",
            "'<|assistant|>'",
        ),
        "<|user|>Q?</s><|assistant|>",
        "</s>",
        "<|system|>S</s><|user|>Q?</s><|assistant|>",
        notes=("it changes white space within texts",),
    ),
    "no end": Shape(
        _turns("'<|' + r + '|>' + m.content", "'<|assistant|>'"),
        "<|user|>Q?<|assistant|>",
        "</s>",
        "<|system|>S<|user|>Q?<|assistant|>",
        notes=("writes nothing to end the assistant's turn",),
    ),
    "an end in words": Shape(
        _turns("r + ': ' + m.content + '\\n###\\n'", "'assistant: '"),
        "user: Q?\n###\nassistant: ",
        "</s>",
        "system: S\n###\nuser: Q?\n###\nassistant: ",
        notes=("ends turns with '\\n###\\n', which is no token of this tokenizer",),
    ),
    "dropped system message": Shape(
        "{% for m in messages if m.role != 'system' %}"
        "{{ '<|' + m.role + '|>' + m.content + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<|user|>Q?</s><|assistant|>",
        "</s>",
        None,
    ),
    "refuses an answer at the end": Shape(
        "{% if messages[-1].role != 'user' %}{{ raise_exception('ask') }}{% endif %}"
        + _turns(_CHATML, _CHATML_ASK),
        _CHATML_PROMPT,
        "<|im_end|>",
        _CHATML_SYSTEM,
        eos="<|im_end|>",
    ),
    "two beginnings": Shape(
        _turns(_HEADS, _HEADS_ASK, "{{ bos_token + bos_token }}"),
        "<|bot|><|bot|>" + _HEADS_PROMPT,
        "<|eot|>",
        "<|bot|><|bot|><|head|>system<|/head|>\n\nS<|eot|>" + _HEADS_PROMPT,
        eos="<|eot|>",
        bos="<|bot|>",
        notes=("begins a prompt with '<|bot|>' twice",),
    ),
    "no beginning": Shape(
        _turns(_CHATML, _CHATML_ASK),
        _CHATML_PROMPT,
        "<|im_end|>",
        _CHATML_SYSTEM,
        eos="<|im_end|>",
        bos="<s>",
        notes=("begins prompts without the '<s>' that texts begin with",),
    ),
}

UNUSABLE = {
    "several, no default": (
        {"rag": "{{ 1 }}", "tool_use": "{{ 2 }}"},
        "several chat templates (rag, tool_use)",
    ),
    "no question": (
        "<|user|><|assistant|>",
        "does not stand in the prompt '<|user|><|assistant|>'",
    ),
    "escapes": (_turns("m.content | e"), "does not stand in the prompt"),
    "lower case": (_turns("m.content | lower"), "does not stand in the prompt"),
    "a type error": (_turns("r + 1"), "it fails: can only concatenate str"),
    "a division": (_turns("1 // 0"), "it fails: integer division or modulo by zero"),
    "a missing attribute": (_turns("m.content.frob()"), "has no attribute 'frob'"),
    "a value error": (_turns("m.content.index('#')"), "it fails: substring not found"),
    "itself for ever": (
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "maximum recursion depth",
    ),
    "syntax": ("{% for m in messages %}", "it fails: Unexpected end of template"),
    "another file": ("{% include 'other.jinja' %}", "it fails: no loader"),
    "a number": (5, "it fails"),
    "its own refusal": ("{{ raise_exception('never') }}", "it fails: never"),
    "an end behind the prompt": (
        _turns(_CHATML, before="") + "{{ eos_token }}",
        "a prompt is not how a conversation begins",
    ),
}
