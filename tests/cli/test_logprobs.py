"""`nemotron-h logprobs` and its library half: the numbers, the JSON of serving engines, where two recordings part."""

import json
import math
import shutil

import pytest
import torch
from families import small_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_h.inspection.comparison import Token, compare
from nemotron_h.inspection.recording import Recording, read, record

IDS = [5, 9, 7, 11, 3]
VALUES = [None, -0.5, -1.25, -3.0, -0.125]


def one_by_one(model, ids) -> list[float]:
    """Log-probabilities from the definition: the model is asked anew for every token, in float64."""
    values = []
    for at in range(1, len(ids)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:at]]), use_cache=False).logits[0, -1].tolist()
        total = math.fsum(math.exp(value) for value in logits)
        values.append(logits[ids[at]] - math.log(total))
    return values


@pytest.mark.core
@pytest.mark.parametrize("family", ["dense", "latent", "tied"])
def test_recorded_numbers(family) -> None:
    model, ids = small_model(family).train(), tokens(1, 19)[0].tolist()
    dump = record(model, ids, layers=True)
    assert model.training
    model.eval()
    assert dump.logprobs[0] is None
    torch.testing.assert_close(torch.tensor(dump.logprobs[1:]), torch.tensor(one_by_one(model, ids)))
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    kinds = model.config.layers_block_type
    names = ["embeddings", *(f"layer {index} ({kind})" for index, kind in enumerate(kinds)), "last norm"]
    assert [*dump.tensors] == names
    # transformers gives what enters each layer, and what leaves the last norm
    for name, state in zip([*names[: len(kinds)], names[-1]], states, strict=True):
        torch.testing.assert_close(dump.tensors[name][:, 0], state[0].square().sum(-1).sqrt())


def test_saved_and_read(tmp_path) -> None:
    model, ids = small_model(), tokens(1, 9)[0].tolist()
    dump = record(model, ids, layers=True)
    dump.save(tmp_path / "a.json")
    again = read(tmp_path / "a.json")
    assert again.logprobs == dump.logprobs and again.ids == ids and [*again.tensors] == [*dump.tensors]
    assert all(torch.equal(again.tensors[name], dump.tensors[name]) for name in dump.tensors)
    assert again.facts["class"] == "nemotron_h.modeling.NemotronHForCausalLM"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(ValueError, match="is there already"):
        dump.save(tmp_path / "a.json")


def test_what_json_has_not_is_saved_and_read(tmp_path) -> None:
    """A NaN stays one: as null it would be no difference."""
    rows = [[1.0, 0.5], [math.inf, -math.inf], [math.nan, math.nan], [2.0, 1.0]]
    layers = {"last norm": torch.tensor(rows, dtype=torch.float64)}
    dump = Recording("a", [None, -math.inf, math.nan, -0.5], [1, 2, 3, 4], list("abcd"), layers)
    dump.save(tmp_path / "a.json")

    def not_json(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    rows = json.loads((tmp_path / "a.json").read_text(), parse_constant=not_json)["tokens"]
    assert [row["logprob"] for row in rows] == [None, -9999, "nan", -0.5]
    again = read(tmp_path / "a.json")
    assert str(again.logprobs) == str(dump.logprobs) and str(again.tensors) == str(dump.tensors)
    assert compare(dump, again).same


@pytest.mark.parametrize("content", ["[null, -1.0, -2.0]", '{"choices": [{"logprobs": {"content": []}}]}'])
def test_a_dump_without_ids_is_saved_and_read(content, tmp_path) -> None:
    rows = [{"token": token, "logprob": value} for token, value in (("a", None), ("b", -1.0), ("c", -2.0))]
    (tmp_path / "a.json").write_text(content.replace("[]", json.dumps(rows)))
    dump = read(tmp_path / "a.json")
    dump.save(tmp_path / "b.json")
    again = read(tmp_path / "b.json")
    assert (again.logprobs, again.ids, again.tokens) == (dump.logprobs, None, dump.tokens)


def test_the_layers_of_a_model_with_an_adapter() -> None:
    peft = pytest.importorskip("peft")
    model, ids = small_model(), tokens(1, 9)[0].tolist()
    plain = record(model, ids, layers=True)
    config = peft.LoraConfig(target_modules=["in_proj"], r=2)  # B starts at zero: the same function
    wrapped = record(peft.get_peft_model(model, config), ids, layers=True)
    assert len(plain.tensors) == len(wrapped.tensors) and compare(plain, wrapped, 1e-6).same


def vllm_row(id: int, value: float) -> dict:
    """The token that stood there and, as vLLM does, the likeliest where that is another."""
    likeliest = {"96": {"logprob": -0.01, "rank": 1, "decoded_token": "x"}} if value < -1 else {}
    return {str(id): {"logprob": value, "rank": 3, "decoded_token": f"t{id}"}, **likeliest}


PROMPT = [None, *(vllm_row(id, value) for id, value in zip(IDS[1:], VALUES[1:], strict=True))]
TEXTS = [f"t{id}" for id in IDS]
OPENAI = {"tokens": TEXTS, "token_logprobs": VALUES, "top_logprobs": None, "text_offset": [0, 2, 4, 6, 9]}
ROWS = [{"id": id, "token": f"t{id}", "logprob": value} for id, value in zip(IDS, VALUES, strict=True)]
SHAPES = {
    "vllm completions": {"id": "cmpl-1", "choices": [{"index": 0, "text": "", "prompt_logprobs": PROMPT}]},
    "vllm chat": {"choices": [{"index": 0, "message": {}, "logprobs": None}], "prompt_logprobs": PROMPT},
    "vllm rows alone": PROMPT,
    "openai echo": {"choices": [{"text": "...", "logprobs": OPENAI}]},
    "openai echo, vllm's prompt too": {"choices": [{"logprobs": OPENAI, "prompt_logprobs": PROMPT[:3]}]},
    "openai, ids as tokens": {
        "choices": [{"logprobs": {"tokens": [f"token_id:{id}" for id in IDS], "token_logprobs": VALUES}}]
    },
    "openai chat": {"choices": [{"message": {}, "logprobs": {"content": ROWS}}]},
    "llama.cpp": {"content": "...", "completion_probabilities": ROWS},
    "llama.cpp before 2025": {
        "completion_probabilities": [
            {"content": f"t{id}", "probs": [{"tok_str": "x", "prob": 0.9}, {"tok_str": f"t{id}", "prob": math.exp(v)}]}
            for id, v in zip(IDS[1:], VALUES[1:], strict=True)
        ]
    },
    "values": VALUES,
    "ids and values": {"token_ids": IDS, "logprobs": VALUES},
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_engines_write(name, tmp_path) -> None:
    (tmp_path / "dump.json").write_text(json.dumps(SHAPES[name]))
    dump = read(tmp_path / "dump.json")
    assert [value for value in dump.logprobs if value is not None] == pytest.approx(VALUES[1:])
    if name in ("openai, ids as tokens", "openai chat", "llama.cpp", "ids and values"):
        assert dump.ids == IDS
    if name.startswith("vllm"):
        assert dump.ids == [-1, *IDS[1:]]
    reference = Recording("reference", VALUES, IDS)
    assert compare(reference, dump, 1e-9).tokens.compared == 4
    changed = Recording("reference", [None, -0.5, -1.25, -3.5, -0.125], IDS, TEXTS)
    comparison = compare(changed, dump, 1e-9)
    assert comparison.tokens.first_token == Token(3, "t11", -3.5, pytest.approx(-3.0))
    assert comparison.tokens.mean == pytest.approx(0.125) and comparison.tokens.max == pytest.approx(0.5)
    assert comparison.tokens.k3 == pytest.approx((math.exp(0.5) - 1 - 0.5) / 4)


def test_a_prompt_and_what_was_generated_after_it(tmp_path) -> None:
    answer = {"choices": [{"prompt_logprobs": PROMPT[:3], "logprobs": {"content": ROWS[3:]}}]}
    (tmp_path / "dump.json").write_text(json.dumps(answer))
    dump = read(tmp_path / "dump.json")
    assert dump.ids == [-1, *IDS[1:]] and dump.logprobs == VALUES
    # generated tokens alone, without ids: the end of the text
    (tmp_path / "end.json").write_text(json.dumps(VALUES[3:]))
    assert compare(Recording("reference", VALUES, IDS), read(tmp_path / "end.json")).tokens.compared == 2


def test_the_end_of_a_text_that_repeats_itself() -> None:
    """Its tokens are the start's too: the numbers say which of them it is."""
    ids, values = [5, 9] * 4, [None, -4.0, -3.0, -2.0, -1.0, -0.5, -0.25, -0.125]
    long = Recording("long", values, ids)
    end = Recording("end", values[4:], ids[4:])
    for noise in (0.0, 1e-3):
        near = Recording("end", [value + noise for value in values[4:]], ids[4:])
        comparison = compare(long, near, 2e-3)
        assert comparison.same and comparison.tokens.compared == 4
        assert compare(near, long, 2e-3).same
    changed = Recording("end", [-1.0, -0.5, -0.25, -9.0], ids[4:])
    assert compare(long, changed, 1e-3).tokens.first_token.position == 7
    assert compare(long, Recording("start", values[:4], ids[:4])).same
    assert compare(long, Recording("start", [None, None, None, -2.0], ids[:4])).same
    # a first token without a number is the text's, whatever the numbers say
    far = compare(long, Recording("start", [None, -0.5, -0.25, -0.125], ids[:4]))
    assert far.tokens.first_token == Token(1, None, -4.0, -0.5)
    broken = Recording("end", [-1.0, math.nan, -0.25, -0.125], ids[4:])
    assert compare(long, broken).tokens.first_token.position == 5
    assert not compare(end, Recording("other", [-1.0, -0.5, -0.25, -0.2], ids[4:])).same


def test_infinities() -> None:
    a, b = Recording("a", [None, -1.0, -math.inf]), Recording("b", [None, -1.0, -math.inf])
    assert compare(a, b).same
    for value in (-1.0, math.nan):
        comparison = compare(a, Recording("b", [None, -1.0, value]), tolerance=1e9)
        assert comparison.tokens.max == math.inf and comparison.tokens.first_token.position == 2


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "cannot be read as JSON"),
        ('{"choices": [{"text": "no"}]}', "ask the server for them"),
        ("[null]", "no log-probability at any token"),
        ('{"prompt_logprobs": [null, {}, {}]}', "unknown shape"),
    ],
)
def test_what_cannot_be_read(content, words, tmp_path) -> None:
    (tmp_path / "dump.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read(tmp_path / "dump.json")


def test_other_tokens() -> None:
    a = Recording("a", VALUES, IDS)
    with pytest.raises(ValueError, match="at position 2, 7 and 8"):
        compare(a, Recording("b", VALUES, [5, 9, 8, 11, 3]))
    with pytest.raises(ValueError, match="neither the start nor the end"):
        compare(a, Recording("b", VALUES[1:3], [1, 2]))
    model = small_model()
    with pytest.raises(ValueError, match="1 token"):
        record(model, [3])
    with pytest.raises(ValueError, match="id 97 is outside the model's vocabulary of 97"):
        record(model, [3, 97])


@pytest.fixture(scope="module")
def other(base_model, tmp_path_factory) -> str:
    """The same model, the attention of layer 2 changed."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(base_model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.2.mixer.o_proj.weight"] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.core
def test_two_models(cli, cli_json, base_model, other, tmp_path) -> None:
    file, text = str(tmp_path / "a.json"), "Anna has 12 apples."
    assert f"written to {file}" in cli("logprobs", base_model, "--text", text, "--record", file, "--layers").stdout
    ids = AutoTokenizer.from_pretrained(base_model)(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    recorded = [row["logprob"] for row in json.loads((tmp_path / "a.json").read_text())["tokens"]]
    torch.testing.assert_close(torch.tensor(recorded[1:]), torch.tensor(one_by_one(model, ids)))
    assert "The same to 0.001" in cli("logprobs", base_model, "--compare", file).stdout
    facts = cli_json("logprobs", other, file, "--tolerance", "1e-6", code=1)  # the recording's tokens, and its layers
    assert facts["first_layer"] == {"name": "layer 2 (attention)", "position": 0}
    assert facts["first_token"]["position"] == 1 and facts["compared"] == len(ids) - 1 and facts["same"] is False
    words = cli("logprobs", other, file, "--tolerance", "1e-6", code=1).stdout
    assert "The first layer that parts is layer 2 (attention), from position 0." in words
    assert "The first token that parts is at position 1 (" in words


def test_two_files_and_every_way_to_give_the_text(cli, cli_json, base_model, tmp_path) -> None:
    text, a, b, c = "Anna has 12 apples.", *(str(tmp_path / name) for name in ("a.json", "b.json", "c.json"))
    ids = AutoTokenizer.from_pretrained(base_model)(text)["input_ids"]
    (tmp_path / "ids").write_text(json.dumps(ids))
    cli("logprobs", base_model, "--file", "-", "--record", a, input=text)
    cli("logprobs", base_model, "--ids", ", ".join(map(str, ids)), "--record", b)
    cli("logprobs", base_model, "--ids", str(tmp_path / "ids"), "--record", c, "--dtype", "float64")
    assert cli_json("logprobs", a, b)["max"] == 0
    assert 0 < cli_json("logprobs", a, c)["max"] < 1e-4
    assert cli_json("logprobs", a)["tokens"] == len(ids)


def test_an_engines_answer_gives_the_tokens(cli_json, refused, base_model, tmp_path) -> None:
    ids = AutoTokenizer.from_pretrained(base_model)("Anna has 12 apples.")["input_ids"]
    values = one_by_one(AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32), ids)
    rows = [{"id": id, "token": "", "logprob": value} for id, value in zip(ids, [None, *values], strict=True)]
    (tmp_path / "a.json").write_text(json.dumps({"choices": [{"logprobs": {"content": rows}}]}))
    assert cli_json("logprobs", base_model, str(tmp_path / "a.json"))["compared"] == len(ids) - 1
    rows[3]["logprob"] += 0.01
    (tmp_path / "a.json").write_text(json.dumps({"choices": [{"logprobs": {"content": rows}}]}))
    assert cli_json("logprobs", base_model, str(tmp_path / "a.json"), code=1)["first_token"]["position"] == 3
    assert cli_json("logprobs", base_model, str(tmp_path / "a.json"), "--tolerance", "0.02")["same"] is True
    prompt = [None, *({str(row["id"]): {"logprob": row["logprob"]}} for row in rows[1:])]
    (tmp_path / "v.json").write_text(json.dumps({"prompt_logprobs": prompt}))
    assert "does not say its first token" in refused("logprobs", base_model, str(tmp_path / "v.json"))
    line = ("logprobs", base_model, str(tmp_path / "v.json"), "--text", "Anna has 12 apples.", "--tolerance", "0.02")
    assert cli_json(*line)["same"] is True


def test_refusals(refused, base_model, tmp_path) -> None:
    assert "There is no text: give --text" in refused("logprobs", base_model)
    assert "by --text and by --ids" in refused("logprobs", base_model, "--text", "a", "--ids", "1,2")
    assert "--ids '1;2' are no token ids" in refused("logprobs", base_model, "--ids", "1;2")
    (tmp_path / "a.json").write_text("[null, -1.0]")
    file = str(tmp_path / "a.json")
    assert "is a recording: --text is for a model" in refused("logprobs", file, "--text", "a")
    assert "is there already" in refused("logprobs", base_model, "--text", "abc", "--record", file)
    assert "name one" in refused("logprobs", base_model, file, "--compare", file)
