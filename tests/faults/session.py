"""A run without Prefect, for the zygote: every stage reused or executed, and the promotion."""

from __future__ import annotations

import os
import sys

from infra.environment import Home, quiet_environment

PRELOAD = ("mlflow", "mlflow.store.tracking.sqlalchemy_store", "infra.registry", "flows.session")


def main() -> int:
    """`session HOME ALGORITHM [A.B=C ...]`"""
    home, algorithm, *more = sys.argv[1:]
    place = Home.resolve(home)
    for name, value in quiet_environment(place).items():
        os.environ.setdefault(name, value)
    from flows.session import open_session
    from tests.faults.house import config

    with open_session(config(algorithm, *more), place) as session:
        for node in session.nodes:
            found = session.reuse(node)
            print(node.name, "reused" if found is not None else "runs", flush=True)
            if found is None:
                assert session.execute(node, print) is not None, "judged against another champion"
    return 0
