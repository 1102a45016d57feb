"""Hostile machines and terminals, and commands that are mistyped."""

from tests.hostile.case import Case

BEGUN = "fireopd train small.yaml run.dir=r > /dev/null 2>&1; "
ENV = "fireopd train small.yaml run.steps=1"

CASES = (
    Case("no command", "fireopd", "Usage", status=None),
    Case("a command that is mistyped", "fireopd trian small.yaml", "train"),
    Case("an option that is mistyped", "fireopd eval runs/done --sampels 3", "--samples"),
    Case("eval of nothing", "fireopd eval", "model"),
    Case("eval of a run that is not there", "fireopd eval runs/don", "did you mean 'done'"),
    Case("eval of an empty folder", "mkdir E; fireopd eval E", "E"),
    Case("eval of a model without a set", "fireopd eval DIR", "--set"),
    Case(
        "eval of a set that is not there", "fireopd eval DIR --set nowhere.jsonl", "nowhere.jsonl"
    ),
    Case(
        "eval of a set without answers",
        "fireopd eval DIR --set q.jsonl",
        "answer",
        {"q.jsonl": '{"prompt": "a"}\n'},
    ),
    Case("eval of no samples", "fireopd eval DIR --set prompts.jsonl --samples 0", "--samples"),
    Case(
        "eval at a temperature that is NaN",
        "fireopd eval DIR --set prompts.jsonl --temperature nan",
        "--temperature",
    ),
    Case(
        "eval of a model of a run that is not there",
        "fireopd eval runs/done --model techer",
        "teacher",
    ),
    Case("eval of a step that is not there", "fireopd eval runs/done --step 77", "77"),
    Case(
        "eval that writes into a folder", "fireopd eval runs/done --out runs --max-tokens 4", "runs"
    ),
    Case(
        "eval that writes to a full disk",
        "fireopd eval runs/done --out /dev/full --max-tokens 4",
        "/dev/full",
    ),
    Case(
        "eval in a set with a name twice",
        "fireopd eval DIR --set a=prompts.jsonl --set a=prompts.jsonl",
        "a",
    ),
    Case("eval against what is not there", "fireopd eval runs/done --against nowhere", "nowhere"),
    Case("generate from an empty input", "fireopd generate DIR < /dev/null", ""),
    Case("generate from a binary input", "printf '\\377%.0s' {1..2500} | fireopd generate DIR", ""),
    Case(
        "generate from an input that never ends",
        "yes | fireopd generate DIR --max-tokens 2 | head -c 100",
        status=None,
    ),
    Case(
        "generate into a file that exists",
        "fireopd generate DIR --prompts prompts.jsonl --out small.yaml",
        "small.yaml",
    ),
    Case(
        "generate into a folder that is not there",
        "fireopd generate DIR --prompts prompts.jsonl --out no/x.jsonl --max-tokens 2",
        "",
        status=0,
    ),
    Case(
        "generate to a full disk",
        "fireopd generate DIR --prompts prompts.jsonl --max-tokens 2 > /dev/full",
        "space",
        status=1,
    ),
    Case(
        "generate to nobody",
        "fireopd generate DIR --prompts prompts.jsonl --max-tokens 2 >&-",
        "",
        status=None,
    ),
    Case(
        "generate of 10^12 tokens",
        "fireopd generate DIR --prompts prompts.jsonl --max-tokens 1000000000000",
        "--max-tokens",
    ),
    Case(
        "generate beyond the model's positions",
        "fireopd generate DIR --prompts prompts.jsonl --max-tokens 100000",
        "",
        status=0,
    ),
    Case(
        "generate with an empty stop",
        "fireopd generate DIR --prompts prompts.jsonl --stop ''",
        "stop",
    ),
    Case(
        "generate with a nucleus of nothing",
        "fireopd generate DIR --prompts prompts.jsonl --top-p 0 --max-tokens 4",
        "",
        status=0,
    ),
    Case(
        "generate from a run without a model",
        "mkdir -p r/models; fireopd generate r --prompts prompts.jsonl",
        "r",
    ),
    Case("chat of nothing", "fireopd chat", "model"),
    Case("chat without a terminal", "fireopd chat DIR --max-tokens 4 < /dev/null", "", status=0),
    Case(
        "chat with bytes that are not UTF-8",
        "printf 'a\\xff\\n' | fireopd chat DIR --max-tokens 4",
        "UTF-8",
    ),
    Case(
        "chat with a line of 1 MB",
        "(head -c 1000000 /dev/zero | tr '\\0' a; echo) | fireopd chat DIR --max-tokens 4",
        "--context",
    ),
    Case(
        "chat with escape sequences",
        "printf '\\e[2J\\e]0;x\\a\\n' | fireopd chat DIR --max-tokens 4",
        "",
        status=0,
    ),
    Case(
        "chat with a command that is not there",
        "printf '/hlep\\n' | fireopd chat DIR --max-tokens 4",
        "/help",
        status=0,
    ),
    Case(
        "serve on a port that is taken",
        'python -c \'import socket,time; s=socket.socket(); s.bind(("127.0.0.1",18765)); '
        "s.listen(); time.sleep(60)' &"
        " sleep 1; fireopd serve DIR --port 18765; code=$?; kill $!; exit $code",
        "18765",
    ),
    Case("serve on a port that is none", "fireopd serve DIR --port 99999", "--port"),
    Case(
        "serve on a host that is none",
        "fireopd serve DIR --host nowhere.invalid",
        "nowhere.invalid",
    ),
    Case("export into a folder with files", "fireopd export runs/done --to DIR", "DIR"),
    Case("export of a folder that is no run", "fireopd export DIR --to new", "DIR"),
    Case("export below a file", "fireopd export runs/done --to prompts.jsonl/x", "prompts.jsonl"),
    Case("export of a step that is not there", "fireopd export runs/done --to new --step 9", "9"),
    Case("resume of nothing", "fireopd resume", "run"),
    Case("resume of a folder that is no run", "fireopd resume DIR", "DIR"),
    Case("resume of a run that is not there", "fireopd resume runs/don", "did you mean 'done'"),
    Case("resume of a finished run", "fireopd resume runs/done", "", status=0),
    Case("resume with fewer steps", "fireopd resume runs/done run.steps=1", "run.steps"),
    Case(
        "resume with another rate",
        "fireopd resume runs/done optim.learning_rate=1",
        "optim.learning_rate",
    ),
    Case(
        "resume without its configuration",
        "rm runs/done/config.yaml; fireopd resume runs/done",
        "config.yaml",
    ),
    Case(
        "resume with an empty configuration",
        "echo -n > runs/done/config.yaml; fireopd resume runs/done run.steps=3",
        "config.yaml",
    ),
    Case(
        "resume without its rows",
        BEGUN + "rm prompts.jsonl; fireopd resume r run.steps=3",
        "data.path",
    ),
    Case(
        "resume with other rows",
        BEGUN + "sed -i 's/What/Wat/' prompts.jsonl; fireopd resume r run.steps=3",
        "data.path",
    ),
    Case(
        "resume with other answers",
        BEGUN + 'sed -i \'s/"4"/"5"/\' prompts.jsonl; fireopd resume r run.steps=3',
        "data.path",
    ),
    Case(
        "resume without its models",
        "rm -r runs/done/models runs/done/checkpoints; fireopd resume runs/done run.steps=3",
        "",
        status=None,
    ),
    Case(
        "resume with a damaged summary",
        "echo '{' > runs/done/summary.json; fireopd resume runs/done",
        "summary.json",
    ),
    Case(
        "resume with half a checkpoint",
        "find runs/done/checkpoints -type f -size +0 | xargs truncate -s 10; "
        "fireopd resume runs/done run.steps=3",
        "checkpoints",
    ),
    Case(
        "resume with metrics that are noise",
        "head -c 3000 /dev/urandom >> runs/done/metrics.jsonl; "
        "fireopd resume runs/done run.steps=3",
        "",
        status=0,
    ),
    Case(
        "two processes in one run",
        "fireopd train small.yaml run.dir=r run.steps=1000000 > /dev/null 2>&1 & "
        "until [ -s r/metrics.jsonl ];"
        " do sleep 1; done; fireopd resume r; code=$?; kill -9 $!; exit $code",
        "in use",
    ),
    Case("a section that is not there", "fireopd keys rolout", "rollout"),
    Case("no home", "env -u HOME " + ENV, "", status=0),
    Case("a home that is a file", "HOME=$PWD/prompts.jsonl " + ENV, "", status=0),
    Case("a home that is not there", "HOME=/nonexistent/x " + ENV, "", status=0),
    Case(
        "a cache that is a file",
        "FIREOPD_CACHE_DIR=$PWD/prompts.jsonl " + ENV,
        "FIREOPD_CACHE_DIR",
        status=0,
    ),
    Case(
        "a cache on a full disk",
        "FIREOPD_CACHE_DIR=/dev/full/x " + ENV,
        "FIREOPD_CACHE_DIR",
        status=0,
    ),
    Case("a temporary folder that is not there", "TMPDIR=/nonexistent " + ENV, "", status=0),
    Case(
        "flags that XLA does not know",
        "XLA_FLAGS=--xla_nonsense=1 " + ENV,
        "xla_nonsense",
        status=None,
    ),
    Case("a platform that is not there", "JAX_PLATFORMS=cuda " + ENV, "cuda"),
    Case("a platform that nobody has", "JAX_PLATFORMS=abacus " + ENV, "abacus"),
    Case("a JAX setting that is none", "JAX_ENABLE_X64=perhaps " + ENV, "JAX_ENABLE_X64"),
    Case("64-bit numbers by default", "JAX_ENABLE_X64=1 " + ENV, "", status=0),
    Case("NaN checks by default", "JAX_DEBUG_NANS=1 " + ENV, "", status=0),
    Case("a width of 0 columns", "COLUMNS=0 " + ENV, "", status=0),
    Case("a width that is a text", "COLUMNS=wide " + ENV, "", status=0),
    Case("a width of 10^9 columns", "COLUMNS=1000000000 " + ENV, "", status=0),
    Case("a terminal that nobody knows", "TERM=abacus " + ENV, "", status=0),
    Case("a language that is not there", "LANG=xx_YY LC_ALL=xx_YY " + ENV, "", status=0),
    Case("ASCII streams", "PYTHONIOENCODING=ascii LC_ALL=C " + ENV, "", status=0),
    Case("no standard streams", ENV + " <&- >&- 2>&-", "", status=0),
    Case("a full disk as output", ENV + " > /dev/full 2>&1", "", status=0),
    Case("a reader that leaves", ENV + " 2>&1 | true; exit ${PIPESTATUS[0]}", "", status=0),
    Case(
        "a folder that was deleted",
        "mkdir gone; cd gone; rmdir ../gone; fireopd train ../small.yaml",
        "",
    ),
    Case("30 open files", "ulimit -n 30; " + ENV, "", status=0),
    Case("files of at most 64 KB", "ulimit -f 64; trap '' XFSZ; " + ENV, "", status=None),
    Case("1 GB of address space", "ulimit -v 1000000; " + ENV, ""),
    Case("python -O", "python -O -m fireopd_jax train small.yaml run.steps=1", "", status=0),
    Case("a file named like a module", "echo 'raise SystemExit(7)' > jax.py; " + ENV, "", status=0),
    Case("a token of the hub with a line break", "HF_TOKEN=$'a\\nb' " + ENV, "", status=0),
    Case("a seed of Python's hashes", "PYTHONHASHSEED=7 " + ENV, "", status=0),
    Case(
        "help of everything",
        "for c in train resume sft eval generate chat serve export data keys verify env bench; "
        "do fireopd $c --help"
        " > /dev/null || exit 1; done",
        "",
        status=0,
    ),
    Case("a program that was never compiled here", "FIREOPD_CACHE_DIR=new " + ENV, "", status=0),
)
