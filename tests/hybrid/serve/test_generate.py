"""``hybrid generate``: text as it is decoded, conversations, and what is refused."""

import io
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import hybrid
from hybrid.cli import main
from hybrid.serve.generate import Generator, Sampling
from hybrid.tokenizer import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = hybrid.HybridConfig(
        layout="LS",
        hidden_size=32,
        vocab_size=259,
        initializer_range=0.5,
        mixers={"S": {"num_heads": 4}, "L": {"num_heads": 2}},
    )
    hybrid.HybridForCausalLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def greedy(folder, text, tokens):
    """What ``generate`` itself decodes."""
    tokenizer = byte_tokenizer()
    ids = torch.tensor([list(text.encode())])
    model = AutoModelForCausalLM.from_pretrained(folder)
    new = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=258)
    return tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


def test_greedy_text_is_that_of_generate(folder, capsys):
    assert (
        main(["generate", str(folder), "abc", "--temperature", "0", "--max-new-tokens", "9"]) == 0
    )
    assert capsys.readouterr().out == "abc" + greedy(folder, "abc", 9) + "\n"


def test_a_seed_repeats_and_another_does_not(folder, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        main(["generate", str(folder), "abc", "--seed", seed, "--max-new-tokens", "20"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_lines_of_standard_input_are_prompts(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n\nde\n"))
    main(["generate", str(folder), "--temperature", "0", "--max-new-tokens", "5"])
    wanted = [prompt + greedy(folder, prompt, 5) + "\n" for prompt in ("abc", "de")]
    assert capsys.readouterr().out == "".join(wanted)


def test_text_arrives_in_pieces(folder):
    pieces = []
    sampling = Sampling(max_new_tokens=40, temperature=0)
    whole = Generator(str(folder)).complete("abc", sampling, pieces.append)
    assert "".join(pieces) == whole == greedy(folder, "abc", 40)
    assert len(pieces) > 2


def test_a_conversation_keeps_its_turns(folder, capsys, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    asked, answers = [], []

    def answer(self, messages, *args):
        asked.append(list(messages))
        answers.append(told(self, messages, *args))
        return answers[-1]

    told = Generator.answer
    monkeypatch.setattr(Generator, "answer", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nho\n"))
    words = ["--chat", "--system", "be", "--temperature", "0", "--max-new-tokens", "4"]
    assert main(["generate", str(folder), *words]) == 0
    assert answers[0] == greedy(folder, "<system>be<user>hi<assistant>", 4)
    first = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    then = [{"role": "assistant", "content": answers[0]}, {"role": "user", "content": "ho"}]
    assert asked == [first, first + then]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chat"], "--chat: expected a tokenizer with a chat template"),
        (
            ["--temperature", "-1", "--top-p", "0"],
            "--temperature: expected 0 (greedy) or more, got",
        ),
        (["--max-new-tokens", "0"], "--max-new-tokens: expected at least 1, got 0"),
        (["--dtype", "int8"], "--dtype: expected float32, bfloat16 or float16, got 'int8'"),
        (["--device", "nowhere"], "--device: expected a device of this machine, got 'nowhere'"),
    ],
)
def test_refusals_are_one_line(folder, capsys, words, message):
    assert main(["generate", str(folder), "abc", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_without_tokenizer_names_the_way_out(folder, capsys):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert main(["generate", str(folder), "abc"]) == 2
    assert "--tokenizer bytes" in capsys.readouterr().err
    assert main(["generate", str(folder), "abc", "--tokenizer", "bytes"]) == 0


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, capsys):
    config = hybrid.HybridConfig(layout="L", hidden_size=16, vocab_size=100)
    hybrid.HybridForCausalLM(config).save_pretrained(tmp_path / "model")
    assert main(["generate", str(tmp_path / "model"), "abc", "--tokenizer", "bytes"]) == 2
    assert "at most 100 tokens" in capsys.readouterr().err


def test_a_run_that_has_not_ended_is_read_from_its_newest_checkpoint(folder, tmp_path, capsys):
    expected = main(["generate", str(folder), "abc", "--temperature", "0"]), capsys.readouterr().out
    for step in (9, 10):
        shutil.copytree(folder, tmp_path / "unfinished" / f"checkpoint-{step}")
    (tmp_path / "unfinished" / "checkpoint-9" / "config.json").write_text("[]")
    found = main(["generate", str(tmp_path / "unfinished"), "abc", "--temperature", "0"])
    output = capsys.readouterr()
    assert (found, output.out) == expected
    assert "the run has not ended; reading checkpoint-10" in output.err


@pytest.mark.parametrize(("name", "got"), [("nowhere", "none"), ("file", "a file")])
def test_a_path_that_is_no_folder_is_named(tmp_path, capsys, name, got):
    (tmp_path / "file").write_text("{}")
    assert main(["generate", str(tmp_path / name), "abc"]) == 2
    assert f"{name}: expected the folder of a checkpoint, got {got}" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "warned"), [(264, False), (32000, True)])
def test_a_tokenizer_much_smaller_than_the_vocabulary_is_named(tmp_path, capsys, size, warned):
    config = hybrid.HybridConfig(
        layout="L", hidden_size=16, vocab_size=size, mixers={"L": {"num_heads": 2}}
    )
    hybrid.HybridForCausalLM(config).save_pretrained(tmp_path / "model")
    words = ["abc", "--tokenizer", "bytes", "--max-new-tokens", "2"]
    assert main(["generate", str(tmp_path / "model"), *words]) == 0
    line = "the model has 32,000 ids, the tokenizer 259"
    assert (line in capsys.readouterr().err) == warned
