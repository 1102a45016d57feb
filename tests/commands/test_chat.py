"""What a chat says and remembers: its answers are those of `generate`, its commands do as told."""

import io
import itertools
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from fireopd_jax import cli
from fireopd_jax.commands.chat.command import ChatCommand, talk
from fireopd_jax.commands.chat.conversation import Chat
from fireopd_jax.commands.chat.reading import message, piped_line
from fireopd_jax.commands.chat.settings import Settings
from fireopd_jax.commands.chat.showing import Screen
from fireopd_jax.commands.chat.sides import sides
from fireopd_jax.commands.chat.slash import run_command
from fireopd_jax.commands.generate import GenerateOptions, generate_to_file
from fireopd_jax.config import UserError
from fireopd_jax.data.settings import DataConfig
from fireopd_jax.data.sources import read_rows
from fireopd_jax.models.hf_export import export_model
from fireopd_jax.rollout.requests import Knobs
from fireopd_jax.session.chatting import Pace, Speaker
from fireopd_jax.session.opening import open_any
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicated
from fireopd_jax.text.chat import prompt_ids, settled
from tests.cases import one_device, random_params, tiny_model
from tests.commands.calling import TOKENIZER, model_folder
from tests.commands.chat_doubles import Scripted, lines, terminal_chat

MODEL = tiny_model(len(TOKENIZER), num_hidden_layers=2, max_position_embeddings=160)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory, MODEL)


@pytest.fixture(scope="module")
def speaker(folder):
    mesh = make_mesh(MeshConfig(data=1))
    spec, params, kwargs = open_any(str(folder), "student", None, replicated(mesh))
    return Speaker("tiny", spec, params, kwargs, mesh=mesh)


def chat_of(*speakers, **settings):
    """Return a chat without a terminal."""
    return Chat(list(speakers), Screen(False), Settings(**{"temperature": 0.0} | settings))


def said(chat, side=0):
    return [turn.answers[side] for turn in chat.turns]


# -- answers of a real engine


def test_greedy_answers_are_those_of_generate_with_the_same_history(folder, speaker, tmp_path):
    chat = chat_of(speaker, max_tokens=9)
    chat.set_system("be brief")
    for question in ("ab", "cde", "f"):
        chat.ask(question)
    rows, messages = [], [{"role": "system", "content": "be brief"}]
    for turn in chat.turns:
        messages = [*messages, {"role": "user", "content": turn.question}]
        rows.append({"prompt": messages})
        messages = [*messages, {"role": "assistant", "content": turn.answers[0]}]
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = GenerateOptions(max_tokens=9, temperature=0.0)
    generate_to_file(str(folder), file, out, options, slots=2)
    expected = [json.loads(line)["text"] for line in out.read_text().splitlines()]
    assert said(chat) == expected and all(expected)


def test_an_answer_only_grows_and_another_sample_is_another_answer(speaker):
    prompt = speaker.prompt([], [[{"role": "user", "content": "ab"}]], 40)
    knobs = Knobs(temperature=1.0, max_tokens=40)
    first = list(speaker.answer(prompt, knobs, 5))
    assert len(first) > 2 and first[-1].finish in ("stop", "length")
    for one, other in itertools.pairwise(first):
        assert other.text.startswith(one.text) and other.tokens > one.tokens
        assert other.seconds > one.seconds >= one.first_s == first[0].first_s
    assert list(speaker.answer(prompt, knobs, 5))[-1].text == first[-1].text
    assert list(speaker.answer(prompt, knobs, 6))[-1].text != first[-1].text


def test_an_answer_that_is_left_disturbs_no_other(speaker):
    prompt = speaker.prompt([], [[{"role": "user", "content": "ab"}]], 40)
    knobs = Knobs(temperature=0.0, max_tokens=30)
    whole = list(speaker.answer(prompt, knobs, 1))[-1].text
    left = speaker.answer(prompt, knobs, 1)
    next(left)
    left.close()
    assert list(speaker.answer(prompt, knobs, 1))[-1].text == whole


def test_the_oldest_turns_are_dropped_where_the_context_ends(speaker, capsys):
    chat = chat_of(speaker, max_tokens=20)
    for index in range(4):
        chat.ask(f"{index}" + "x" * 30)
    assert len(chat.turns) == 4
    noted = capsys.readouterr().err
    assert "longer than the context of 160 tokens: its oldest 1 turn are not read" in noted
    kept = [turn.of(0) for turn in chat.turns[-2:]]
    messages = [*kept[0], *kept[1][:1]]
    (ids,) = prompt_ids(TOKENIZER, [messages], {})
    prompt = speaker.prompt([], [kept[0], kept[1][:1]], 20)
    assert list(prompt.ids) == ids and prompt.dropped == 0
    with pytest.raises(UserError, match=r"the message has 2\d\d tokens .*context is 160 tokens"):
        chat.ask("y" * 200)
    assert len(chat.turns) == 4 and chat.unanswered == 1


def test_a_context_beyond_the_models_positions_is_refused(speaker):
    with pytest.raises(UserError, match=r"--context 200: tiny has 160 positions"):
        Speaker("tiny", speaker.spec, {}, {}, context=200)


def test_a_character_that_has_begun_waits_for_its_other_bytes():
    texts = [TOKENIZER.decode(list("aé".encode())[:count]) for count in (1, 2, 3)]
    assert [settled(text) for text in texts] == ["a", "a", "aé"]


def test_the_pace_grows_while_a_run_is_short_and_shrinks_after_a_long_one():
    pace = Pace()
    for _ in range(9):
        pace.after(0.001)
    assert pace.steps == 64
    pace.after(1.0)
    assert pace.steps == 32
    slow = Pace()
    for _ in range(5):  # 1 s of conversion, 0.05 s a token: runs of up to two seconds
        slow.after(1 + 0.05 * slow.steps)
    assert 4 <= slow.steps <= 32


# -- what was said


def test_history_system_undo_and_retry():
    speaker = Scripted("one", "two", "three", "four")
    chat = chat_of(speaker, seed=7)
    chat.ask("a")
    chat.set_system("s")
    chat.ask("b")
    assert speaker.seen[-1] == [
        ("system", "s"), ("user", "a"), ("assistant", "one"), ("user", "b"),
    ]  # fmt: skip
    chat.retry()
    assert speaker.seen[-1] == speaker.seen[-2] and said(chat) == ["one", "three"]
    assert len(set(speaker.samples)) == 3
    chat.undo()
    chat.set_system("")
    chat.ask("c")
    assert speaker.seen[-1] == [("user", "a"), ("assistant", "one"), ("user", "c")]
    chat.clear()
    with pytest.raises(UserError, match="nothing has been said"):
        chat.undo()
    with pytest.raises(UserError, match="nothing has been said"):
        chat.retry()
    again = Scripted("one")
    chat_of(again, seed=7).ask("a")
    assert again.samples == speaker.samples[:1]


def test_settings_change_the_next_answer(capsys):
    speaker = Scripted("a b c d")
    chat = chat_of(speaker)
    chat.set("temperature=0.2, top_k=3 --max-tokens=2")
    chat.ask("x")
    assert speaker.knobs == [Knobs(temperature=0.2, top_p=0.95, top_k=3, max_tokens=2)]
    assert said(chat) == ["a b"]
    assert "cut at --max-tokens 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, error",
    [
        ("temprature=1", r"no setting 'temprature' \(did you mean 'temperature'\?\)"),
        ("temperature=-1", "temperature= and a number of at least 0"),
        ("temperature", "expected temperature= and"),
        ("top_p=2", "a number from 0 to 1"),
        ("top_k=1.5", "an integer of at least 0"),
        ("temperature=nan", "a number of at least 0"),
        ("max_tokens=0", "an integer of at least 1"),
    ],
)
def test_a_wrong_setting_is_refused(words, error):
    with pytest.raises(UserError, match=error):
        Settings().changed(words)


@pytest.mark.parametrize(
    "line, error",
    [
        ("/hlp", r"no command /hlp \(did you mean '/help'\?\)"),
        ("/sytem be brief", "did you mean '/system'"),
        ("/undo 2", "/undo takes no argument, but there is '2'"),
        ("/save", "expected a file"),
    ],
)
def test_a_wrong_command_is_refused(line, error):
    with pytest.raises(UserError, match=error):
        run_command(chat_of(Scripted("a")), line)


@pytest.mark.parametrize("line", ["/etc/hosts holds what?", "what is 3/4?", "/ 2", "//"])
def test_a_message_with_a_slash_is_no_command(line):
    assert not run_command(chat_of(Scripted("a")), line)


def test_help_lists_every_command(capsys):
    assert run_command(chat_of(Scripted("a")), "/help")
    noted = capsys.readouterr().err
    names = ("help", "clear", "undo", "retry", "system", "set", "save", "exit")
    assert all(f"/{name}" in noted for name in names)


def test_what_was_said_is_saved_as_rows(tmp_path):
    chat = chat_of(Scripted("one", "two", title="A"), Scripted("uno", "dos", title="B"))
    file = tmp_path / "said.jsonl"
    with pytest.raises(UserError, match="nothing has been said"):
        chat.save(str(file))
    chat.set_system("s")
    chat.ask("a")
    chat.ask("b")
    chat.save(str(file))
    rows = read_rows(DataConfig(path=str(file)))
    assert [row.reference for row in rows] == ["two", "dos"]
    assert [turn["content"] for turn in rows[1].prompt] == ["s", "a", "uno", "b"]
    with pytest.raises(UserError, match=r"said\.jsonl exists"):
        chat.save(str(file))
    with pytest.raises(UserError, match="cannot be written"):
        chat.save(str(tmp_path / "none" / "x.jsonl"))


# -- reading, and signals


@pytest.mark.parametrize(
    "typed, expected",
    [
        (["a"], "a"),
        (["a\\", "b\\", "c"], "a\nb\nc"),
        (['"""a', "b", 'c"""'], "a\nb\nc"),
        (['"""', "a", '"""'], "a"),
        (['"""a"""'], "a"),
        (['"""a', "b"], "a\nb"),
        (["a\\"], "a"),
    ],
)
def test_a_message_may_have_several_lines(typed, expected):
    assert message(lines(*typed)) == expected


def test_a_piped_line_without_end_is_refused(monkeypatch):
    monkeypatch.setattr("fireopd_jax.commands.chat.reading.LONGEST_LINE", 4)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc\nabcde\n")))
    assert piped_line("") == "abc"
    with pytest.raises(UserError, match="a line of over 4 bytes"):
        piped_line("")


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said():
    speaker = Scripted("a b c d e f")
    speaker.during = lambda count: count == 3 and signal.raise_signal(signal.SIGINT)
    chat, shown = terminal_chat(speaker)
    before = signal.getsignal(signal.SIGINT)
    talk(chat, lines("hello", KeyboardInterrupt(), "again"))
    assert said(chat) == ["a b c d", "a b c d"]
    assert "4 tokens" in shown() and shown().count("stopped") == 2
    assert "Ctrl-C again" in shown()
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_twice_at_the_prompt_leaves():
    chat, _ = terminal_chat(Scripted("a"))
    with pytest.raises(KeyboardInterrupt):
        talk(chat, lines(KeyboardInterrupt(), KeyboardInterrupt(), "never"))
    assert not chat.turns


def test_an_escape_sequence_of_a_model_does_not_reach_the_terminal():
    chat, shown = terminal_chat(Scripted("a\x1b[2J b\x9b1m\x07"))
    chat.ask("x")
    assert "a�[2J b�1m�" in shown() and not any(each in shown() for each in "\x1b\x9b\x07")
    assert said(chat) == ["a\x1b[2J b\x9b1m\x07"]


# -- the command


def call(monkeypatch, typed, *arguments):
    """Run the command with these lines on standard input; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["fireopd", "chat", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
    try:
        cli.main()
    except SystemExit as done:
        return done.code or 0
    return 0


def test_piped_lines_are_answered_in_plain_text(monkeypatch, capsys, folder, tmp_path):
    saved = tmp_path / "s.jsonl"
    typed = f"ab\n\n/hlp\ncd\n/save {saved}\n"
    options = ["--greedy", "--max-tokens", "5", "--context", "120"]
    assert call(monkeypatch, typed, str(folder), *options) == 0
    out, err = capsys.readouterr()
    answers = [each["content"] for each in json.loads(saved.read_text())["messages"][1::2]]
    shown = [
        answer.translate({i: 0xFFFD for i in range(32) if chr(i) != "\n"}) for answer in answers
    ]
    assert len(answers) == 2 and out.replace("\t", "�") == "".join(f"{each}\n" for each in shown)
    assert "\x1b" not in out + err and "did you mean '/help'" in err and "loading" in err
    assert call(monkeypatch, "x" * 200 + "\n", str(folder), *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and "no room for an answer" in err


@pytest.mark.parametrize(
    "arguments, error",
    [
        ([], "expected a MODEL"),
        (["no/such/folder/here"], "no such folder"),
        (["--greedy", "--temperature", "1", "x"], "conflict"),
        (["--dtype", "float16", "x"], "--dtype float16"),
        (["FOLDER", "--compare"], "is no run, so that there is no model before it"),
        (["FOLDER", "--compare", "FOLDER"], "is no run"),
        (["--compare", "FOLDER"], "is no run"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, folder, arguments, error):
    arguments = [str(folder) if each == "FOLDER" else each for each in arguments]
    assert call(monkeypatch, "hi\n", *arguments) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("fireopd: ") and error in last


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run with three models, which have no parameters."""
    for name in ("student", "student_start", "teacher_a%20b"):
        (tmp_path / "r" / "models" / name).mkdir(parents=True)
        (tmp_path / "r" / "models" / name / "model.json").write_text("{}")
    return str(tmp_path / "r")


def test_the_models_of_a_comparison(run, folder):
    both = [(run, "student_start"), (run, "student")]
    for model, compare in ((None, run), (run, "before"), (run, run)):
        assert [(each.model, each.name) for each in sides(model, compare, "student")] == both
    other = [(str(folder), "student"), (run, "student")]
    assert [(each.model, each.name) for each in sides(str(folder), run, "student")] == other
    teacher = [(run, "student"), (run, "teacher_a b")]
    assert [(e.model, e.name) for e in sides(run, "teacher_a b", "student")] == teacher
    with pytest.raises(UserError, match=r"did you mean 'student_start'\?"):
        sides(run, "student_strt", "student")
    with pytest.raises(UserError, match="the same model"):
        sides(run, "student", "student")
    with pytest.raises(UserError, match="only a run's student has a model before it"):
        sides(run, "before", "teacher_a b")


def test_two_models_are_compared_side_by_side(monkeypatch, capsys, folder, tmp_path):
    other = tmp_path / "other"
    params = random_params(MODEL, seed=1)
    export_model(other, params, MODEL.config, TOKENIZER, stop=(257,), card="# another\n")
    monkeypatch.setenv("COLUMNS", "80")
    saved = tmp_path / "s.jsonl"
    arguments = [str(folder), "--compare", str(other), "--greedy", "--max-tokens", "6"]
    assert call(monkeypatch, f"ab\n/save {saved}\n", *arguments) == 0
    out, _ = capsys.readouterr()
    one, two = (json.loads(line) for line in saved.read_text().splitlines())
    assert one["model"] == str(folder) and two["model"] == str(other)
    assert one["messages"][1] != two["messages"][1]
    assert out.count("6 tokens") + out.count("cut at --max-tokens") >= 2
    assert all(len(line) <= 80 for line in out.splitlines()) and "─┼─" in out
    alone = chat_of(ChatCommand(
        str(other), None, "student", None, None, None, Settings(), None, 1, ()
    )._speaker(sides(str(other), None, "student")[0], True), max_tokens=6)  # fmt: skip
    alone.ask("ab")
    assert two["messages"][1]["content"] == said(alone)[0]


@pytest.mark.slow
@pytest.mark.kill
def test_ctrl_c_on_a_real_terminal_ends_the_answer_alone(folder):
    main, side = pty.openpty()
    code = "from fireopd_jax.cli import main; main()"
    arguments = ["chat", str(folder), "--temperature", "3", "--top-p", "1", "--max-tokens", "100"]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=side, stdout=side, stderr=side, env=one_device() | {"TERM": "xterm"},
        start_new_session=True,
    )  # fmt: skip
    os.close(side)
    seen = b""

    def until(words, timeout=120):
        nonlocal seen
        end = time.monotonic() + timeout
        while words not in seen:
            assert time.monotonic() < end, seen
            if select.select([main], [], [], 1)[0]:
                seen += os.read(main, 4096)

    try:
        until(b">>> ")
        os.write(main, b"hello\n")
        until(b"tokens/s")
        seen = b""
        child.send_signal(signal.SIGINT)
        until(b"Ctrl-C again")
        os.write(main, b"/exit\n")
        assert child.wait(60) == 0
    finally:
        child.kill()
        os.close(main)
