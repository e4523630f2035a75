"""`ligature doctor`: check this node, or a job's nodes, in seconds, before hours are spent on them.

Tested in tests/launch/recover/test_node_checks.py.
"""

from __future__ import annotations

import os
from pathlib import Path

from launch.recover.node_checks import Checks, Finding, examine, gpus_here
from launch.start.command import error_with_code, ligature_command
from launch.start.local import run_ranks
from runtime.errors import LigatureError, RecipeError
from runtime.ranks import Ranks, ranks_from_environment
from runtime.recipe import OptionParser


def run(arguments: list[str]) -> None:
    """Print one line for each check.

    Outside a job this starts the ranks on this machine; each of them runs this command again.

    Raises:
        LigatureError: A check failed that would stop a run.
    """
    parser = OptionParser(
        "ligature doctor", description="Check a node, or a job's nodes, before time is spent on them."
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder that runs will write to (default runs)")
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        help="shard folder that runs will read; repeat the option for several",
    )
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="device that runs will use (default auto)"
    )
    parser.add_argument(
        "--nproc", type=int, help="ranks to start here (default: one a GPU, else 2); a job has its own number"
    )
    options = parser.parse_args(arguments)
    if options.nproc is not None and options.nproc < 1:
        raise RecipeError(f"--nproc is {options.nproc}; it is a number of processes, 1 or more")
    ranks = ranks_from_environment()
    # A rank in a world of one has RANK. Without this condition it would start itself again, without end.
    if ranks.world == 1 and "RANK" not in os.environ:
        code = run_ranks(ligature_command("doctor", *arguments), options.nproc or gpus_here() or 2)
        if code:
            raise error_with_code("", code)  # the ranks have printed the reason
        return
    print_findings(examine(Checks(options.runs, options.data, options.device), ranks), ranks)


def print_findings(findings: list[tuple[str, Finding]], ranks: Ranks) -> None:
    """Print the findings on the first rank, or on every rank where the ranks could not meet.

    Args:
        findings: (host, finding) pairs.
        ranks: This process's rank.

    Raises:
        LigatureError: There is a FAIL among them.
    """
    failed = [finding for _, finding in findings if finding.level == "FAIL"]
    # `meet` adds this finding. Where it is missing, the first rank has not heard of the others' findings.
    if ranks.first or not any(finding.name == "together" for _, finding in findings):
        hosts = {host for host, _ in findings}
        for host, finding in findings:
            where = f"{host}: " if len(hosts) > 1 or not ranks.first else ""
            print(f"{finding.level:5} {where}{finding.name:10} {finding.text}", flush=True)
    if failed:
        first = f"{failed[0].name}: {failed[0].text}"
        # No message from the other ranks: the first rank's line speaks for all of them.
        raise LigatureError(
            f"{len(failed)} of {len(findings)} checks failed; the first, {first}" if ranks.first else ""
        )
