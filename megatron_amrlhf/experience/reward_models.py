"""The reward models of a run on answers: which folders, what they need, whether they fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.chat import (
    check_system_prompt,
    end_token_ids,
    marker_token_id,
)
from megatron_amrlhf.data.checking import Accept
from megatron_amrlhf.data.prompts import EncodedPrompt
from megatron_amrlhf.data.tokenizer import load_tokenizer
from megatron_amrlhf.data.vocabulary import (
    check_rows,
    check_vocabulary,
    check_whole_vocabulary,
    has_more_ids,
    refuse_beyond,
)
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded
from megatron_amrlhf.models.expected import HEAD_NAMES, check_weights
from megatron_amrlhf.models.fingerprint import model_fingerprint
from megatron_amrlhf.models.shape import check_shape, read_shape
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config
from megatron_amrlhf.rewards.kinds import (
    KIND,
    MARKER,
    OUTCOME,
    OUTPUT,
    PROCESS,
    SEPARATOR,
    reward_kind,
)
from megatron_amrlhf.rewards.marking import StepMarker
from megatron_amrlhf.rewards.offline import OfflineScores, load_offline
from megatron_amrlhf.rewards.verifiable import check_library


@dataclass(frozen=True)
class RewardModel:
    """One reward model.

    Attributes:
        role: ``prm`` or ``orm``, its name in the engine.
        folder: Hugging Face folder with a head.
        num_attributes: outputs of the head.
        tokenizer: its own, or None if that is the policy's: then it scores the policy's ids.
        marker: at which it judges steps; None: it is read at every token.
    """

    role: str
    folder: Path
    num_attributes: int
    tokenizer: PreTrainedTokenizerBase | None
    marker: StepMarker | None = None

    @property
    def fingerprint(self) -> str:
        """Of its weights, and of the marker and separator of its rows."""
        rows = "" if self.marker is None else f" {self.marker.text!r} {self.marker.separator!r}"
        return model_fingerprint(self.folder) + rows


def load_reward_models(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[RewardModel, ...]:
    """The reward models that have a weight, checked. No process group is needed.

    Raises:
        UserError: a folder has no head, its sizes do not divide by the layout, or the run says
            something else about its output or its step marker.
    """
    section, models = config.reward_model, []
    if config.reward.prm_weight and section.path:
        models.append(_load(config, "prm", "reward_model.path", section.path, tokenizer))
        given, found = section.attribute_weights, models[0].num_attributes
        if given is not None and len(given) != found:
            raise UserError(
                f"reward_model.attribute_weights: {len(given)} weights, but the PRM has "
                f"{found} attributes"
            )
    if config.reward.orm_weight and section.orm_path:
        models.append(_load(config, "orm", "reward_model.orm_path", section.orm_path, tokenizer))
    return tuple(models)


def lack_ids(models: Sequence[RewardModel], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model with the policy's tokenizer has no embedding for some of its ids."""
    sizes = [_vocab_size(model) for model in models if model.tokenizer is None]
    return has_more_ids(tokenizer, min(sizes)) if sizes else False


def check_same_rows(
    models: Sequence[RewardModel],
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Tensor],
    usable: Tensor | None,
) -> None:
    """Checks that models with the policy's tokenizer have embeddings for the policy's ids.

    Args:
        models: of the run.
        tokenizer: the policy's.
        rows: 1-D int64 ids of the data, or those of `highest_rows`.
        usable: ``[V]`` bool, what the policy may sample; None: nothing is sampled.

    Raises:
        UserError: an id is too large.
    """
    rows = list(rows)
    for model in models:
        if model.tokenizer is not None:
            continue
        size = _vocab_size(model)
        check_rows(rows, tokenizer, size, model.folder)
        if usable is not None:
            largest, advice = int(usable.nonzero()[-1]), "the policy has one and can sample it"
            refuse_beyond(largest, tokenizer, size, model.folder, advice)


def _vocab_size(model: RewardModel) -> int:
    return read_shape(read_hf_config(model.folder)).vocab_size


def load_offline_scores(config: Config, models: tuple[RewardModel, ...]) -> OfflineScores | None:
    """The scored data set that threshold or normalisation need, checked; None if neither does.

    Raises:
        UserError: the file is wrong or from another PRM.
    """
    if "offline" not in (config.mask.threshold, config.reward.normalise):
        return None
    (prm,) = (model for model in models if model.role == "prm")
    assert config.mask.offline_file is not None, "checked with the configuration"
    return load_offline(
        config.mask.offline_file,
        config.mask.offline_statistic,
        config.mask.offline_quantile,
        prm.fingerprint,
        config.reward_model.attribute_weights,
    )


def answer_check(config: Config) -> Accept | None:
    """What refuses a prompt without what the verifiable reward compares with; None without that.

    Raises:
        UserError: math-verify is not installed.
    """
    if not config.reward.verifiable_weight:
        return None
    check_library()
    return check_answer


def check_answer(prompt: EncodedPrompt) -> None:
    """Whether a prompt has a reference answer.

    Raises:
        UserError: it has none.
    """
    if prompt.answer is None or not prompt.answer.strip():
        raise UserError(
            f"{prompt.where}: 'answer' is missing, which reward.verifiable_weight compares "
            "with: add it or drop this line"
        )


def _load(
    config: Config, role: str, key: str, path: str, policy_tokenizer: PreTrainedTokenizerBase
) -> RewardModel:
    folder = expanded(path)
    shape = check_shape(config, folder)
    weights = ShardedWeights(folder)
    if HEAD_NAMES[0] not in weights:
        raise UserError(
            f"{key}: {folder} has no reward head (head.weight): give the export folder of a run "
            f"with algorithm.kind {role}"
        )
    num_attributes = weights.get(HEAD_NAMES[0]).shape[0]
    check_weights(folder, num_attributes)
    if role == "prm":
        _check_output(config, folder)
    elif read_hf_config(folder).get(KIND) == PROCESS:
        raise UserError(
            f"{key}: {folder} is a PRM, which has learned nothing about whole answers: give the "
            "export folder of a run with algorithm.kind orm"
        )
    own = load_tokenizer(folder)
    check_vocabulary(own, end_token_ids(own, folder), shape.vocab_size, folder)
    is_same = _same(own, policy_tokenizer)
    if not is_same:  # it cuts what the policy writes, which may be the text of any token
        check_whole_vocabulary(own, shape.vocab_size, folder)
        check_system_prompt(own, config.data.system_prompt, folder)
    if not is_same and config.data.format == "pairs":
        raise UserError(
            f"{key}: the tokenizer of {folder} is not that of {config.model.path}, which "
            "data.format: pairs needs: train it on the same model family"
        )
    return RewardModel(
        role=role,
        folder=folder,
        num_attributes=num_attributes,
        tokenizer=None if is_same else own,
        marker=_step_marker(config, folder, own) if role == "prm" else None,
    )


def _check_output(config: Config, folder: Path) -> None:
    """Whether the run takes a PRM's numbers for what they are, where its folder says it."""
    wanted = config.reward_model.output
    found = read_hf_config(folder).get(OUTPUT, wanted)
    if found != wanted:
        raise UserError(
            f"reward_model.output: is {wanted}, but the head of {folder} gives a {found}: set it "
            f"to {found}"
        )


def _step_marker(
    config: Config, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> StepMarker | None:
    """A PRM's marker as the run says, or else its folder; None for a PRM without one."""
    section, said = config.reward_model, read_hf_config(folder)
    text = said.get(MARKER) if section.step_marker is None else section.step_marker
    if config.data.step_marker not in (None, text):
        raise UserError(
            f"data.step_marker: {config.data.step_marker!r} is for training; {folder} is read "
            f"{f'at {text!r}' if text else 'without a marker'}: set reward_model.step_marker"
        )
    if text is None:
        if section.step_separator is not None:
            raise UserError(
                "reward_model.step_separator: is read with reward_model.step_marker only"
            )
        return None
    if reward_kind(said) == OUTCOME:
        raise UserError(f"reward_model.step_marker: {folder} is an ORM, which judges no steps")
    separators = (section.step_separator, said.get(SEPARATOR), "\n")
    token_id = marker_token_id(tokenizer, text, "reward_model.step_marker")
    assert token_id is not None, "there is a marker"
    return StepMarker(
        text=text,
        token_id=token_id,
        separator=next(x for x in separators if x is not None),
    )


def _same(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether ids and the template are the same, so that a row of one is a row of the other."""
    return (
        a.get_vocab() == b.get_vocab()
        and a.chat_template == b.chat_template
        and a.eos_token_id == b.eos_token_id
    )
