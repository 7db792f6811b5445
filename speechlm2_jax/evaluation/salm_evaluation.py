"""Evaluation of a SALM: load, generate, score, write the output manifest and the report."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from speechlm2_jax.evaluation.compare import other_seeds
from speechlm2_jax.evaluation.comparisons import CONTROLS
from speechlm2_jax.evaluation.config import EvalConfig, check_generation
from speechlm2_jax.evaluation.controls import control_inputs, control_texts
from speechlm2_jax.evaluation.devices import Loaded, load, show
from speechlm2_jax.evaluation.encoder_wer import (
    EncoderTranscriber,
    RemembersTexts,
    encoder_texts,
    open_ctc_model,
)
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.metrics.task_metrics import PERPLEXITY
from speechlm2_jax.evaluation.perplexity import losses_of_references
from speechlm2_jax.evaluation.plan import ENCODER, EvaluationPlan
from speechlm2_jax.evaluation.provenance import provenance
from speechlm2_jax.evaluation.results import Evaluation
from speechlm2_jax.evaluation.resuming import Journals, start_fingerprint
from speechlm2_jax.evaluation.run import evaluate, input_keys, make_prompt
from speechlm2_jax.evaluation.score_table import table
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.errors import errors_name_key
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.settings import SettingsError

if TYPE_CHECKING:
    from speechlm2_jax.models import SALM


def run_salm_evaluation(plan: EvaluationPlan) -> None:
    """Generates a response to each input, writes output manifest and report, prints the table."""
    # cheap checks come before the model is loaded
    config = plan.config
    utterances = plan.utterances()
    seeds = other_seeds(config.seeds, utterances)
    output, page = plan.output("output_manifest"), plan.output("report")
    show(plan.summary(utterances))

    from speechlm2_jax.evaluation.html_report.page import write_page

    fingerprint = start_fingerprint(config.pretrained_name)
    loaded = load(config, model_class(config).from_pretrained)
    model = loaded.model.eval()
    if config.generation:  # once more, for token ids that this vocabulary lacks
        check_generation(config.generation, config.max_new_tokens, model)
    ctc_model = _encoder_ctc_model(plan)
    draft_model = _draft_model(plan, model.sampling_rate, ctc_model)
    keys, sha256 = input_keys(utterances), fingerprint.result()
    with Journals(output, loaded, sha256, keys) as journals:
        result = journals.run(
            lambda journal: evaluate(
                *(model, utterances, loaded.config, show, journal),
                is_joint=loaded.is_joint,
                draft_model=draft_model,
            )
        )
        complete = _second_passes(loaded, utterances, ctc_model)
        controls = _control_texts(loaded, utterances, draft_model)
        if result is None:
            return
        result = replace(complete(result), training=plan.training_summary(), seeds=seeds)
        for name, texts in controls.items():
            result = result.with_control(name, texts)
        totals = result.totals()
        record = provenance(config, loaded.device, totals, sha256=sha256, step=plan.step)
        journals.finish(result.rows(), record)
        print(table(totals))
        if output is not None:
            print(f"answers: {output}")
    if page is not None:
        rate_hz = model.sampling_rate
        write_page(page, result, utterances, record, media_rows=config.report_rows, rate_hz=rate_hz)
        print(f"report:  {page}  (open it in a browser)")


def _second_passes(
    loaded: "Loaded[SALM, EvalConfig]",
    utterances: Sequence[Utterance],
    ctc_model: EncoderTranscriber | None,
) -> Callable[[Evaluation], Evaluation]:
    """Transcribes by the encoder and computes the losses of references, where they are wanted.

    All processes must call it. Returns what adds the results to an evaluation.
    """
    model, config = loaded.model, loaded.config
    texts, losses = None, None
    if ctc_model is not None:
        texts = encoder_texts(ctc_model, utterances, config.batch_size, config.max_audio_s)
    if PERPLEXITY in config.metrics:
        losses = losses_of_references(
            *(model, utterances, make_prompt(model, config), config.batch_size, config.max_audio_s),
            is_joint=loaded.is_joint,
        )

    def complete(result: Evaluation) -> Evaluation:
        if texts is not None:
            result = result.with_encoder_texts(texts)
        if losses is None:
            return result
        result = result.with_losses(losses)
        if long := sum(s.response.loss is None for s in result.scored()):
            longest = f"max_audio_s={config.max_audio_s}"
            show(f"note   {PERPLEXITY}: leaves out {long} recordings longer than {longest}")
        return result

    return complete


def _control_texts(
    loaded: "Loaded[SALM, EvalConfig]", utterances: Sequence[Utterance], draft_model: Any
) -> dict[str, dict[int, str]]:
    """The responses of each control by index of the input. All processes must call it."""
    config = loaded.config
    if not config.controls:
        return {}
    found = {}
    for name, inputs in control_inputs(utterances, config.use_normalizer).items():
        show(f"control: {CONTROLS[name]}")
        found[name] = control_texts(
            *(loaded.model, inputs, config), is_joint=loaded.is_joint, draft_model=draft_model
        )
    return found


def model_class(config: EvalConfig) -> "type[SALM]":
    """The class of the model: `use_asr_decoder` tells it, else what is found."""
    from speechlm2_jax import models

    is_with_asr = config.use_asr_decoder
    if is_with_asr is None:
        found = Location().local(config.pretrained_name)
        is_with_asr = found is not None and registry.identify(found) is registry.SALM_WITH_ASR
    return models.SALMWithAsrDecoder if is_with_asr else models.SALM


def _draft_model(plan: EvaluationPlan, rate_hz: int, encoder: EncoderTranscriber | None) -> Any:
    """The ASR model whose transcripts are drafts, or the draft LLM; None without `draft`.

    `encoder` is the run's own, if it is loaded already. Raises SettingsError for a model that
    cannot be used.
    """
    if plan.draft_file is None:
        return None
    if plan.config.draft == ENCODER and encoder is not None:
        return _of_rate(encoder, rate_hz)
    from speechlm2_jax import models

    is_file = plan.config.draft != ENCODER and plan.draft_file.is_file()
    with errors_name_key("draft"):
        kind = registry.identify(plan.draft_file)
        if kind is not None and (kind.is_llm or kind is registry.SALM):
            opened = models.SALM if kind is registry.SALM else models.DraftLLM
            return opened.from_pretrained(plan.draft_file, dtype=plan.config.dtype)
        transcriber = models.ASRModel if is_file else models.CTCModel
        return _of_rate(transcriber.from_pretrained(plan.draft_file), rate_hz)


def _of_rate(found: EncoderTranscriber, rate_hz: int) -> EncoderTranscriber:
    if found.sampling_rate != rate_hz:
        raise SettingsError(
            f"draft: transcribes audio of {found.sampling_rate} Hz, but the model reads {rate_hz} "
            "Hz; name an ASR model of the same rate"
        )
    return found


def _encoder_ctc_model(plan: EvaluationPlan) -> EncoderTranscriber | None:
    """The encoder with its CTC head if `encoder_wer` is on.

    An encoder without a CTC head is an error only if the command line sets `encoder_wer`.
    """
    if plan.encoder_file is None:
        return None
    try:
        with errors_name_key("encoder_wer"):
            return RemembersTexts(open_ctc_model(plan.encoder_file))
    except SettingsError as error:
        if "encoder_wer" in plan.given:
            raise
        print(f"note   {error}")
        return None
