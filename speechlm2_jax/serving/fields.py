"""Reads the values of a request: each of the right type and range, and none unknown."""

from collections.abc import Collection, Mapping
from typing import Any

from speechlm2_jax.data.json_lines import check_surrogates
from speechlm2_jax.serving.api_errors import ApiError, bad
from speechlm2_jax.serving.jobs import Sampling
from speechlm2_jax.serving.service import Service
from speechlm2_jax.settings import SettingsError


class Fields:
    """The fields of a request by name; JSON values, or the texts of a form."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {key: value for key, value in values.items() if value is not None}

    def refuse(self, reasons: Mapping[str, str], harmless: Mapping[str, Collection[Any]]) -> None:
        """Raises ApiError for a field that is not supported, unless its value is harmless."""
        for key, why in reasons.items():
            if key in self._values and self._values[key] not in harmless.get(key, ()):
                raise bad(f"{key}: not supported: {why}", key, "unsupported_parameter")

    def check_known(self, known: Collection[str]) -> None:
        """Raises ApiError for the first field of another name."""
        for key in self._values:
            if key not in known:
                raise bad(f"{key}: unknown; the server reads {', '.join(sorted(known))}", key)

    def text(self, key: str, default: str = "") -> str:
        """A text."""
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise bad(f"{key}: expected a text, got {type(value).__name__}", key)
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        """A number from `low` to `high`."""
        value = self._values.get(key, default)
        try:
            if isinstance(value, bool):
                raise ValueError
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise bad(f"{key}: expected a number, got {value!r:.40}", key) from None
        if not low <= number <= high:
            raise bad(f"{key}: expected {low:g} to {high:g}, got {number:g}", key)
        return number

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        number = self.number(key, default, low, high)
        if number != int(number):
            raise bad(f"{key}: expected a whole number, got {number:g}", key)
        return int(number)

    def flag(self, key: str) -> bool:
        """A truth value; False if it is not given."""
        value = self._values.get(key, False)
        known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
        if not isinstance(value, bool | str) or value not in known:
            raise bad(f"{key}: expected true or false, got {value!r:.40}", key)
        return known[value]

    def one_of(self, key: str, choices: Collection[str], default: str) -> str:
        """One of some texts."""
        value = self.text(key, default)
        if value not in choices:
            raise bad(f"{key}: expected one of {', '.join(choices)}; got {value!r:.40}", key)
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is."""
        return self._values.get(key, default)


def check_unicode(values: object) -> None:
    """Raises ApiError for a text or a name, however deep in JSON, that no UTF-8 can hold.

    Such a text can neither be tokenized nor be told in a response.
    """
    try:
        check_surrogates(values)
    except SettingsError as error:
        raise bad(f"the body is not Unicode: {error}") from None


def sampling_of(fields: Fields) -> Sampling:
    """Sampling settings. Without a temperature, or with 0, decoding is greedy."""
    temperature = fields.number("temperature", 0.0, 0.0, 2.0)
    top_p = fields.number("top_p", 1.0, 0.0, 1.0)
    seed = fields.integer("seed", 0, 0, 2**31 - 1)
    if temperature == 0.0:
        return Sampling()
    return Sampling(do_sample=True, temperature=temperature, top_p=top_p, seed=seed)


def check_model(service: Service, fields: Fields) -> None:
    """Raises ApiError if a request names another model."""
    name = service.options.served_name
    asked = fields.text("model", name)
    if asked != name:
        raise ApiError(
            404,
            f"model: {asked!r:.80} is not served here; this is {name!r}",
            param="model",
            code="model_not_found",
        )
