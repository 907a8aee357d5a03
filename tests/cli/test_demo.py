"""`nemotron-h demo`: it counts right, and the bundled model is as good as it is said to be."""

import pytest

from nemotron_h.bundled import read_answer


def test_counts(cli_json, chat_model: str) -> None:
    result = cli_json("demo", "-n", "2", "-m", chat_model, "--max-new-tokens", "5")
    for way in ("reasoning", "no_reasoning"):
        tally = result[way]
        assert tally["problems"] == len(tally["replies"]) == 2
        assert tally["right"] == sum(reply["right"] for reply in tally["replies"])
        assert tally["tokens"] == sum(reply["tokens"] for reply in tally["replies"]) == 10
    assert result["peak_memory_bytes"] > 0


@pytest.mark.core
def test_the_bundled_model_reasons_better_than_not(cli_json) -> None:
    result = cli_json("demo", "-n", "10")
    assert result["reasoning"]["accuracy"] >= 0.8  # 0.9 and more over all of them: figures.json
    assert result["no_reasoning"]["accuracy"] < result["reasoning"]["accuracy"]


def test_shown(cli) -> None:
    text = cli("demo", "-n", "1").stdout
    assert "1/1" in text and "with reasoning" in text and "without reasoning" in text
    assert "tokens/s" in text and "Peak memory" in text
    assert "When it was trained" in text


@pytest.mark.parametrize(
    "text, answer", [("The answer is 21.", 21), ("1,021", 1021), ("From 3 to 4", 4), ("none", None), (None, None)]
)
def test_read_answer(text: str | None, answer: int | None) -> None:
    assert read_answer(text) == answer
