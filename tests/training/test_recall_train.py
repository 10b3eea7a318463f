"""The trainer: it learns, resumes exactly, and says what is wrong with a checkpoint."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from workbench.training.recall import batches, checkpoint, text, train


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A model and batches small enough for a test."""
    full = train.model_config

    def shrunk(*args):
        config = full(*args)
        config.num_hidden_layers, config.intermediate_size = 2, 64
        return config

    monkeypatch.setattr(train, "model_config", shrunk)
    monkeypatch.setattr(batches, "SHAPES", ((64, 2),) * len(text.LEVELS))


def weights(folder):
    return checkpoint.load(folder)["model"]


def test_two_steps_and_two_resumed_equal_four(tmp_path):
    steps = []
    train.train(tmp_path / "four", steps=4, device="cpu", progress=lambda p: steps.append(p.step))
    train.train(tmp_path / "parts", steps=2, device="cpu")
    half = weights(tmp_path / "parts")
    train.train(tmp_path / "parts", steps=4, resume=True, device="cpu")
    assert steps == [1, 2, 3, 4]
    one, other = weights(tmp_path / "four"), weights(tmp_path / "parts")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[name], half[name]) for name in one)


def test_the_exported_folder_loads_by_itself(tmp_path):
    train.train(tmp_path, steps=1, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    assert model(**tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)).logits.shape[
        -1
    ] == len(tokenizer)


def test_an_interruption_leaves_a_checkpoint(tmp_path):
    def interrupt(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path, steps=5, device="cpu", progress=interrupt)
    assert checkpoint.load(tmp_path)["progress"]["step"] == 2


def test_a_broken_checkpoint_is_one_clear_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no checkpoint .* start without resume"):
        train.train(tmp_path, steps=1, resume=True, device="cpu")
    (tmp_path / checkpoint.FILE).write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="cannot be read .* delete it and start again"):
        train.train(tmp_path, steps=1, resume=True, device="cpu")


def test_minutes_or_steps_but_not_both(tmp_path):
    with pytest.raises(ValueError, match="minutes or steps, not both"):
        train.train(tmp_path, minutes=1, steps=1)


def test_training_starts_from_an_induction_circuit(tmp_path):
    model = train.Training(tmp_path, device="cpu").model.eval()
    model.set_attn_implementation("eager")
    torch.manual_seed(1)
    ids = torch.randint(2, model.config.vocab_size, (2, 60)).repeat(1, 2)  # 60 random tokens, twice
    with torch.inference_mode():
        first, second = model(input_ids=ids, output_attentions=True).attentions
    heads = range(model.config.num_attention_heads)
    back = [
        first[:, h].diagonal(-(1 + h // 4), 1, 2).mean() for h in heads
    ]  # one token in the first group, two in the second
    assert min(back) > 0.8
    assert second[:, :4].diagonal(-59, 2, 3)[..., 1:].mean() > 0.25  # what followed the same token
