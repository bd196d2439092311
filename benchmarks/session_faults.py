"""Servers killed with -9 at random while eight clients count in metric sessions, for a minute on each store.

    python benchmarks/session_faults.py [--seconds 60] [--seed 0]

One server over a SQLite file, then two over one Redis (redis-server has to be installed). Prints how many updates were
acknowledged and how many have counted; the exit status is 1 where these differ in any session. tests/ runs it shortly.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import sys
import tempfile

TESTS = str(pathlib.Path(__file__).parents[1] / "tests")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.path.insert(0, TESTS)
    # The servers load their model from there, too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
    from support import session_faults
    from support.redis_servers import RedisProcess

    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = [f"sqlite://{folder}/sessions.sqlite3"]
        print("one server, SQLite:", session_faults.run(file, 1, options.seconds, options.seed), flush=True)
        redis = stack.enter_context(RedisProcess(folder))
        shared = [redis.url, redis.url]
        print("two servers, one Redis:", session_faults.run(shared, 1, options.seconds, options.seed), flush=True)


if __name__ == "__main__":
    main()
