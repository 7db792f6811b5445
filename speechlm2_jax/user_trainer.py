"""`slm.Trainer`: the training loop, with the validation scores of train.py.

The package `training` imports no model. This module imports the composition root, which does, only
when scores are needed.
"""

from collections.abc import Mapping, Sequence

from speechlm2_jax.training import trainer
from speechlm2_jax.training.protocol import DataSource, HostMetric, Scoring, TrainableModel
from speechlm2_jax.training.run.run_state import FitResult


class Trainer(trainer.Trainer):
    """Trains and validates models. Keywords are Lightning's (docs/training.md lists them)."""

    def fit(
        self,
        model: TrainableModel,
        datamodule: DataSource,
        *,
        validation_metrics: Mapping[str, HostMetric] | None = None,
        validation_scoring: Scoring | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> FitResult:
        """Trains as `training.trainer.Trainer.fit`; without metrics, generated text is scored.

        A SALM or CTC model then has `val_wer` and sample hypotheses at each validation, a duplex
        model its BLEU scores. `validation_metrics={}` scores nothing but the losses.
        """
        if validation_metrics is None and validation_scoring is None:
            validation_metrics, validation_scoring = _scores(model, self.config.validation_metrics)
        return super().fit(
            *(model, datamodule),
            validation_metrics=validation_metrics,
            validation_scoring=validation_scoring,
            settings=settings,
        )

    def validate(
        self,
        model: TrainableModel,
        datamodule: DataSource,
        *,
        validation_metrics: Mapping[str, HostMetric] | None = None,
        validation_scoring: Scoring | None = None,
    ) -> dict[str, float]:
        """Validates as `training.trainer.Trainer.validate`, with the scores of `fit`."""
        if validation_metrics is None and validation_scoring is None:
            validation_metrics, validation_scoring = _scores(model, self.config.validation_metrics)
        return super().validate(
            *(model, datamodule),
            validation_metrics=validation_metrics,
            validation_scoring=validation_scoring,
        )


def _scores(
    model: TrainableModel, names: Sequence[str]
) -> tuple[Mapping[str, HostMetric] | None, Scoring | None]:
    from speechlm2_jax.validation_scores import validation_scores

    metrics, scoring = validation_scores(model, names)
    return {**metrics, **model.validation_metrics}, scoring
