"""The folder of `tvq export --format=hf` in transformers, without jax and tvq: `make test-hf`."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = sorted(Path(os.environ["TVQ_HF_CASES"]).iterdir()) if "TVQ_HF_CASES" in os.environ else []
pytestmark = [
    pytest.mark.skipif(not CASES, reason="TVQ_HF_CASES names no folder of tests.hf.cases; see make test-hf"),
    pytest.mark.filterwarnings("default"),  # transformers warns of itself
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def loaded(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def expected(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "expected.npz") as file:
        return dict(file)


@torch.no_grad()
def log_probs(model, ids, **more) -> np.ndarray:
    return model(ids, **more).logits.log_softmax(-1).to(torch.float64).numpy()


def off(got: np.ndarray, want: np.ndarray) -> float:
    """The largest deviation, over the largest entry."""
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    return np.abs(got - want.astype(np.float64)).max() / np.abs(want).max()


def in_pieces(model, ids, length: int) -> np.ndarray:
    state, found = None, []
    with torch.no_grad():
        for piece in ids.split(length, 1):
            output = model(piece, state=state)
            state = output.state
            found.append(output.logits.log_softmax(-1).to(torch.float64).numpy())
    return np.concatenate(found, 1)


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_log_probs_are_those_of_tvq(folder):
    model, want = loaded(folder), expected(folder)
    assert not {"jax", "tvq"} & set(sys.modules)
    ids, tolerance = torch.tensor(want["inputs"], dtype=torch.long), TOLERANCE[model.narrow]
    errors = {"parallel": off(log_probs(model, ids), want["parallel"])}
    errors["one by one"] = off(in_pieces(model, ids, 1), want.get("one_by_one", want["parallel"]))
    errors["pieces of 7"] = off(in_pieces(model, ids, 7), want["parallel"])
    print(folder.name, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= tolerance, errors


def named(name: str) -> Path:
    found = [folder for folder in CASES if folder.name == name]
    assert found, f"no case {name}"
    return found[0]


@pytest.fixture(scope="module")
def apart():
    """A small model that keeps documents apart, and ids."""
    folder = named("apart_scaled")
    return loaded(folder), torch.tensor(expected(folder)["inputs"], dtype=torch.long)


def test_padding_on_the_left_changes_nothing(apart):
    model, ids = apart
    want = log_probs(model, ids)
    for n_pad in (1, 3, 11):
        pad = torch.zeros(len(ids), n_pad, dtype=torch.long)
        mask = torch.cat([pad, torch.ones_like(ids)], 1)
        got = log_probs(model, torch.cat([pad, ids], 1), attention_mask=mask)
        assert off(got[:, n_pad:], want) <= 1e-5
    for name in ("decode_h2_agg1_peabs_L6_M5", "fwd_h2_agg0_peabs_tie_L4_M12"):  # across documents
        other = loaded(named(name))
        few = ids[:, :40] % other.config.vocab_size
        mask = torch.cat([torch.zeros(len(few), 5, dtype=torch.long), torch.ones_like(few)], 1)
        got = log_probs(other, torch.cat([mask[:, :5], few], 1), attention_mask=mask)
        assert off(got[:, 5:], log_probs(other, few)) <= 1e-5


def test_padding_on_the_right_is_not_seen_and_ends_a_text(apart):
    model, ids = apart
    mask = torch.ones_like(ids)
    mask[1, 30:] = 0
    output = model(ids, attention_mask=mask)
    got = output.logits.detach().log_softmax(-1).double().numpy()
    assert off(got[1, :30], log_probs(model, ids)[1, :30]) <= 1e-5
    with pytest.raises(ValueError, match="padding within a text"):
        model(ids[:, :1], state=output.state)
    mask[1, 60:] = 1
    with pytest.raises(ValueError, match="padding within a text"):
        model(ids, attention_mask=mask)


def test_documents_do_not_affect_each_other(apart):
    model, ids = apart
    ids = ids.clone()
    ids[:, 50] = 1
    want = log_probs(model, ids[:, 50:])
    assert off(log_probs(model, ids)[:, 50:], want) <= 1e-5
    assert off(in_pieces(model, ids, 7)[:, 50:], want) <= 1e-5


def size(state) -> int:
    """Bytes of all that a state holds on to, whole arrays where it has a view of them."""
    return sum(
        x.untyped_storage().nbytes()
        for x in [state.start_BE, state.begun_B1, state.ended_B1, *(x for unit in state.units for x in unit)]
    )


@torch.no_grad()
def test_the_state_has_a_constant_size(apart):
    model, ids = apart
    first = model(ids[:, :1]).state
    assert size(first) == size(model(ids).state) == size(model(ids.repeat(1, 5)).state)


def test_small_values_change_a_large_sum(apart):
    module = sys.modules[type(apart[0]).__module__]
    like = torch.zeros(1, 1, 1, 1)
    state = module.UnitState(like[..., 0].long(), like + 0.25, like[..., 0] + 1, like + 2**24, like)
    codes, values, starts = torch.zeros(1, 1, 2).long(), torch.full((1, 1, 2, 1), 0.25), torch.zeros(1, 3)
    for _ in range(1000):
        *_, state = module.cache(codes, values, starts, starts[:, :2], state, 1)
    assert state.sum_BHSV.item() == pytest.approx(2**24 + 250, abs=2)
    assert state.count_BHS.item() == 1001


@torch.no_grad()
def test_a_state_is_forked_reordered_and_reset(apart):
    model, ids = apart
    state, tail = model(ids[:, :-1]).state, ids[:, -1:]
    fork = state.fork(2)
    want = model(tail, state=state).logits
    assert state.position == ids.shape[1]
    got = model(tail.repeat_interleave(2, 0), state=fork).logits
    torch.testing.assert_close(got, want.repeat_interleave(2, 0), rtol=1e-5, atol=1e-5)
    turned = model(ids[:, :-1]).state
    turned.reorder_cache(torch.tensor([2, 0]))
    torch.testing.assert_close(model(tail[[2, 0]], state=turned).logits, want[[2, 0]], rtol=1e-5, atol=1e-5)
    state.reset()
    torch.testing.assert_close(model(ids, state=state).logits, model(ids).logits)
    with pytest.raises(ValueError, match="the state is of 3 sequences, input_ids of 2"):
        model(ids[:2], state=state)


def greedy(model, ids, **more):
    return model.generate(ids, do_sample=False, max_new_tokens=12, **more)


def by_hand(model, ids):
    """Twelve greedy tokens, each after reading all before it again; after an end id only padding."""
    for _ in range(12):
        best = model(ids).logits[:, -1].argmax(-1)
        best = torch.where((ids[:, 50:] == 1).any(1), 0, best)
        ids = torch.cat([ids, best[:, None]], 1)
    return ids


@torch.no_grad()
def test_generate(apart):
    model, ids = apart
    ids = ids[:, :50]
    want = by_hand(model, ids)
    assert torch.equal(greedy(model, ids), want[:, : greedy(model, ids).shape[1]])
    assert torch.equal(greedy(model, ids, use_cache=False), greedy(model, ids))
    # Prompts of unequal lengths, padded on the left, continue as each alone.
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    alone = greedy(model, ids[:1, 20:])[0, 30:]
    beside = greedy(model, ids.masked_fill(mask == 0, 0), attention_mask=mask)[0, 50:]
    assert torch.equal(beside[: len(alone)], alone)


@torch.no_grad()
def test_generate_continues_a_state_and_leaves_it(apart):
    model, ids = apart
    want = greedy(model, ids[:, :50])[:, 50:]
    state = model(ids[:, :40]).state
    for _ in range(2):
        assert torch.equal(greedy(model, ids[:, 40:50], state=state)[:, 10:], want)
    assert state.position == 40
    several = model.generate(
        ids[:, 40:50], state=state, do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=12
    )
    assert torch.equal(several[::2, 10:], want)
    assert torch.equal(several[1::2, 10:], want)


@torch.no_grad()
def test_beams(apart):
    """The best of as many beams as there are ids, two tokens deep, is the best of all pairs."""
    model, ids = apart
    ids, C = ids[:1, :30], model.config.vocab_size
    first = model(ids).logits[:, -1].log_softmax(-1)[0]
    pairs = torch.cat([ids.expand(C, -1), torch.arange(C)[:, None]], 1)
    both = first[:, None] + model(pairs).logits[:, -1].log_softmax(-1)
    best = divmod(both.argmax().item(), C)
    got = model.generate(
        ids, num_beams=C, do_sample=False, max_new_tokens=2, length_penalty=0.0, eos_token_id=None
    )
    assert tuple(got[0, 30:].tolist()) == best


@torch.no_grad()
def test_losses_are_those_of_the_labels(apart):
    model, ids = apart
    labels = ids.clone()
    labels[0, 20:] = -100
    picked = torch.tensor(log_probs(model, ids))[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    want = -picked[labels[:, 1:] != -100].mean()
    torch.testing.assert_close(model(ids, labels=labels).loss.double(), want, rtol=1e-5, atol=1e-5)
    assert model(ids, logits_to_keep=1).logits.shape[1] == 1


def test_training_is_refused(apart):
    model, ids = apart
    model.train()
    with pytest.raises(RuntimeError, match="for inference"):
        model(ids)
    model.eval()


@pytest.mark.parametrize("name", ["apart", "revived", "bfloat16", "float64"])
def test_saved_again_it_is_the_same(name, tmp_path):
    model = loaded(named(name))
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert again.config.tvq == model.config.tvq
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[key]) and x.dtype == theirs[key].dtype for key, x in mine.items())


def test_the_trained_run_writes_what_tvq_sample_writes():
    folder = named("trained")
    want, model = expected(folder), loaded(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = str(want["text"])
    assert tokenizer(text)["input_ids"] == want["inputs"][0].tolist()
    assert tokenizer.decode(want["inputs"][0][1:]) == text
    prompt = tokenizer("import ", return_tensors="pt")
    got = model.generate(**prompt, do_sample=False, max_new_tokens=60)
    assert tokenizer.decode(got[0], skip_special_tokens=True) == str(want["sample"]).removesuffix("\n")


def test_the_snippets_of_the_docs(capsys):
    page = Path(__file__).parents[2] / "docs" / "hf.md"
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(snippets) == 2
    exec("".join(snippets).replace("runs/hf", str(named("trained"))), {})
    said = capsys.readouterr().out
    assert said.startswith("import ")
    assert "\n---\nclass Thing" in said
    first, second = said.rpartition("\n---\n")[2].splitlines()[-2:]
    assert len(said) > 100, said
    assert first
    assert second


def test_special_names_in_a_text_are_text():
    tokenizer = transformers.AutoTokenizer.from_pretrained(named("apart"), trust_remote_code=True)
    ids = tokenizer("a</s>b")["input_ids"]
    assert ids == [1, *(byte + 3 for byte in b"a</s>b")]
    batch = tokenizer(["a", "abc"], padding=True)
    assert batch["input_ids"][0] == [0, 0, 1, 100]
    assert batch["attention_mask"][0] == [0, 0, 1, 1]
    assert set(batch) == {"input_ids", "attention_mask"}
