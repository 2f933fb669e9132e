"""Stands in for `nestify compress`: does what the recipe's model is called, and says so in a common file.

ok: leave a nested file. slow S: the same after S seconds. exit N: fail. missed: leave a file and fail, as a
budget does. later N: leave a checkpoint and fail with N, but the second time a file. kill N: end by a signal.
wait: end when a signal comes, leaving a checkpoint. stubborn: obey no signal, with a child that obeys none.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
STUBBORN = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 10, 15)]; time.sleep(60)"


def say(*words: object) -> None:
    with open(os.environ["FAKE_TRACE"], "a") as trace:
        trace.write(" ".join(map(str, words)) + "\n")


def leave(output: Path) -> None:
    shutil.copy(os.environ["FAKE_FILE"], output.with_suffix(".part"))
    output.with_suffix(".part").replace(output)


def wait(name: str) -> int:
    came: list[int] = []
    for number in STOPS:
        signal.signal(number, lambda number, _: came.append(number))
    say("ready", name, os.getpid())
    while not came:
        time.sleep(0.01)
    return 130 if came == [signal.SIGINT] else 143


def refuse_to_end(name: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", STUBBORN])
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    say("ready", name, os.getpid(), child.pid)
    time.sleep(60)


def main() -> int:
    recipe = json.loads(Path(sys.argv[1]).read_text())
    output = Path(recipe["output"])
    name = output.parent.name
    action, _, word = recipe["model"]["name"].partition(" ")
    checkpoint = output.parent / output.name.replace(".nested.", ".resume.")
    how = "on" if checkpoint.exists() else "anew"
    say("begin", name, how, os.environ.get("OMP_NUM_THREADS", "-"))
    print("nestify: it went\x1b wrong", file=sys.stderr, flush=True)
    code = 0
    match action:
        case "ok":
            leave(output)
        case "slow":
            time.sleep(float(word))
            leave(output)
        case "missed":
            leave(output)
            code = 1
        case "exit":
            code = int(word)
        case "later" if checkpoint.exists():
            leave(output)
        case "later":
            checkpoint.touch()
            code = int(word)
        case "kill":
            os.kill(os.getpid(), int(word))
        case "wait":
            code = wait(name)
            checkpoint.touch()
        case "stubborn":
            refuse_to_end(name)
    say("end", name)
    return code


if __name__ == "__main__":
    if os.environ.get("FAKE_PATIENCE"):
        from nestify.compression.batch.runner import watch_parent

        watch_parent(float(os.environ["FAKE_PATIENCE"]))
    sys.exit(main())
