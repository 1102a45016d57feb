"""Against `transformers serve`: a server that is not ours, with a small random model."""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from fireopd_jax.config import UserError
from fireopd_jax.remote.canary import check_texts
from fireopd_jax.remote.client import Client
from fireopd_jax.remote.logprobs import ScoreRow, score_features
from fireopd_jax.remote.settings import ServedConfig
from fireopd_jax.remote.texts import Prefix, TextFeatures, continuations, text_features
from fireopd_jax.text.tokenizer import byte_tokenizer
from tests.remote.fake import Said

pytestmark = [pytest.mark.slow, pytest.mark.parity]
ASKED = [{"role": "user", "content": "2+2?"}]
HEAD = "<|user|>2+2?<|end|><|assistant|>"


def prefix(partial):
    return Prefix(ASKED, partial, [1, 2, 3], HEAD + partial)


class Foreign:
    """A process of `transformers serve`, on one port."""

    def __init__(self, folder):
        self.folder, self.process = folder, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    def start(self):
        command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
        options = ["--device", "cpu", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.folder.parent / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "serve", str(self.folder), *options],
                stdout=log,
                stderr=log,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )

    def wait(self):
        """Wait until it listens."""
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError((self.folder.parent / "serve.log").read_text())

    def kill(self):
        self.process.kill()
        self.process.wait()

    def client(self, file, said, **settings):
        url = f"http://127.0.0.1:{self.port}/v1"
        settings = ServedConfig(url=url, model=str(self.folder), retries=300, **settings)
        return Client(settings, file, said, name="judge", sleep=lambda s: time.sleep(0.2))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    torch = pytest.importorskip("torch")
    for needed in ("fastapi", "accelerate"):
        pytest.importorskip(needed)
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("foreign") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=261, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=257, pad_token_id=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    # The server takes the temperature of a request, but this from the model's folder.
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    server = Foreign(folder)
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def test_what_the_server_supports_is_found_and_it_answers(foreign):
    said = Said()
    with foreign.client(None, said) as client:
        found = text_features(client, prefix("It is"))
        assert found == TextFeatures("bare_text", 1, True, "max_tokens")
        check_texts(client, found, prefix("It is"))
        assert "is continued by" in said[1] and len(said) == 2
        worded = text_features(client, Prefix(ASKED, "It is"))
        assert worded == TextFeatures("instruction", 1, True, "max_tokens")
        check_texts(client, worded, Prefix(ASKED, "It is"))
        assert client.stats()["requests_unanswered"] == 0


def test_it_has_no_log_probabilities_and_that_is_said(foreign):
    refused = pytest.raises(UserError, match="no log-probabilities of a prompt's tokens")
    with foreign.client(None, Said()) as client, refused:
        score_features(client, ScoreRow([1, 2], [3, 4]))


@pytest.mark.kill
def test_killed_midway_and_restarted_every_text_comes_and_none_is_asked_for_again(
    foreign, tmp_path
):
    given = [prefix("It is " + "x" * i) for i in range(10)]
    features = TextFeatures("bare_text", 1, True, "max_tokens")
    arrived, sent, lock = [], [], threading.Lock()
    with foreign.client(tmp_path / "answers", Said(), concurrency=4) as client:
        plain = client._transport.send

        def send(path, body):
            with lock:
                sent.append(body["seed"])
                if len(sent) == 12:
                    foreign.kill()
                    foreign.start()
            answer = plain(path, body)
            with lock:
                arrived.append(body["seed"])
            return answer

        client._transport.send = send
        texts = continuations(client, features, given, 3, max_tokens=8, seed=5)
        stats = client.stats()
    assert [len(each) for each in texts] == [3] * 10
    assert len({text for each in texts for text in each}) > 20, "samples differ"
    assert len(arrived) == len(set(arrived)) == 30, "each answer arrived once"
    assert len(sent) - 30 == stats["requests_unanswered"] == stats["requests_retried"] > 0
    foreign.kill()
    with foreign.client(tmp_path / "answers", Said()) as client:
        assert continuations(client, features, given, 3, max_tokens=8, seed=5) == texts
        assert client.stats()["requests_sent"] == 0
    foreign.start()
    foreign.wait()
