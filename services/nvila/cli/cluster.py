"""`nvila cluster`: look at, wait for, scale and collect evidence from nvila in a Kubernetes cluster."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from nvila.cli import cluster_bundle, cluster_doctor, cluster_live, cluster_release, cluster_scale, cluster_wait, show
from nvila.cli.cluster_api import Cluster
from nvila.cli.cluster_doctor import Finding, Intent, Level
from nvila.cli.cluster_live import Live
from nvila.cli.cluster_release import Pool, Release

_SIGNS = {
    Level.OK: ("✓", "green"),
    Level.NOTE: ("·", "cyan"),
    Level.WARN: ("!", "yellow"),
    Level.FAIL: ("✗", "bold red"),
    Level.UNKNOWN: ("?", "magenta"),
}


def run(args: argparse.Namespace) -> int:
    actions: dict[str, Callable[[Cluster, argparse.Namespace], int]] = {
        "doctor": _doctor,
        "status": _status,
        "wait": _wait,
        "scale": _scale,
        "bundle": _bundle,
    }
    with Cluster.connect(kubeconfig=args.kubeconfig, context=args.context, namespace=args.namespace) as cluster:
        return actions[args.action](cluster, args)


# -- doctor -----------------------------------------------------------------------------------------------------------


def _doctor(cluster: Cluster, args: argparse.Namespace) -> int:
    with show.waiting(f"examining {cluster.context}"):
        findings = cluster_doctor.examine(cluster, Intent(args.release, wants_gpus=not args.cpu))
    failed = [finding for finding in findings if finding.level is Level.FAIL]
    if args.json:
        show.print_json(
            {
                "context": cluster.context,
                "namespace": cluster.namespace,
                "ok": not failed,
                "findings": [asdict(finding) for finding in findings],
            }
        )
    else:
        _print_findings(findings)
    if any("refuses the credentials" in finding.what for finding in failed):
        return 4
    return 7 if failed else 0


def _print_findings(findings: Sequence[Finding]) -> None:
    console = show.results()
    before = ""
    for finding in findings:
        sign, style = _SIGNS[finding.level]
        line = Text.assemble((sign, style), " ", (f"{finding.check if finding.check != before else '':10}", "bold"))
        console.print(line.append(finding.what), soft_wrap=True)
        if finding.mend and finding.level is not Level.OK:
            console.print(Text.assemble("             ", ("→ ", style), (finding.mend, "dim")), soft_wrap=True)
        before = finding.check
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    console.print(
        f"\n{counts[Level.FAIL]} to mend, {counts[Level.WARN]} to know, {counts[Level.UNKNOWN]} could not be looked at"
    )


# -- status -----------------------------------------------------------------------------------------------------------


def _status(cluster: Cluster, args: argparse.Namespace) -> int:
    with show.waiting(f"asking {cluster.context}"):
        release = cluster_release.read(cluster, args.release)
        live = cluster_live.look(cluster, release)
    if args.json:
        show.print_json(_as_json(release, live))
    else:
        _print_status(release, live)
    return 0 if release.is_ready else 7


def _as_json(release: Release, live: dict[str, Live]) -> dict[str, Any]:
    pools = {}
    for pool in release.pools:
        pools[pool.component] = {
            "kind": pool.kind,
            "name": pool.name,
            "ready": pool.ready,
            "desired": pool.desired,
            "range": [pool.least, pool.most] if pool.scaled_by else None,
            "scaled_by": pool.scaled_by or None,
            "version": pool.version,
            "gpus": cluster_release.gpus_wanted(pool.pods),
            "reasons": pool.reasons,
            "live": asdict(live[pool.component]) if pool.component in live else None,
        }
    return {
        "release": release.name,
        "namespace": release.namespace,
        "chart": release.chart,
        "ready": release.is_ready,
        "pools": pools,
    }


def _print_status(release: Release, live: dict[str, Live]) -> None:
    console = show.results()
    console.print(f"\n[bold]{release.name}[/]  {release.namespace}  [dim]{release.chart}[/]\n")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in ("pool", "ready", "scaled by", "backlog", "queue", "in work", "image"):
        table.add_column(title, justify="left" if title in ("pool", "scaled by", "image") else "right", no_wrap=True)
    for pool in release.pools:
        now = live.get(pool.component, Live())
        table.add_row(
            pool.component,
            Text(f"{pool.ready}/{pool.desired}", style="green" if pool.is_ready else "yellow"),
            f"{pool.scaled_by} {pool.least}–{pool.most}" if pool.scaled_by else "",
            "" if now.backlog_s is None else f"{now.backlog_s:.1f} s",
            _queue(pool, now),
            _in_work(now),
            pool.version.rpartition("/")[2],
        )
    console.print(table)
    for pool in release.pools:
        for reason in pool.reasons:
            console.print(Text(f"  {pool.component}: {reason}", style="yellow"), soft_wrap=True)
        for untold in live.get(pool.component, Live()).untold:
            console.print(Text(f"  {pool.component}: {untold}", style="dim"), soft_wrap=True)
    written = sum(now.cache_written_bytes or 0 for now in live.values())
    used = next((now.cache_used_bytes for now in live.values() if now.cache_used_bytes is not None), None)
    cached = f"{used / 1e9:.2f} GB held" if used is not None else "what is held needs the gateway's metrics"
    console.print(f"\ntokens cached: {written / 1e9:.2f} GB written by the vision pods of now, {cached}\n", style="dim")


def _queue(pool: Pool, now: Live) -> str:
    if now.queue is None:
        return ""
    return f"{now.queue:,.0f} {'tiles' if pool.component == 'vision' else 'positions'}"


def _in_work(now: Live) -> str:
    value = now.running if now.running is not None else now.in_flight
    return "" if value is None else f"{value:,.0f}"


# -- wait, scale, bundle ----------------------------------------------------------------------------------------------


def _wait(cluster: Cluster, args: argparse.Namespace) -> int:
    began_s, said = time.monotonic(), ""
    for state in cluster_wait.follow(cluster, args.release, args.timeout):
        counts = "  ".join(f"{pool.component} {pool.ready}/{pool.desired}" for pool in state.pools)
        line = counts if state.is_ready else f"{counts}  ({cluster_wait.explain(state)})"
        if line != said and not args.json:
            said = line
            print(f"{time.monotonic() - began_s:5.0f} s  {line}", file=sys.stderr, flush=True)
    if args.json:
        show.print_json({"release": args.release, "ready": True, "seconds": round(time.monotonic() - began_s, 1)})
    else:
        print(f"{args.release} is ready after {time.monotonic() - began_s:.0f} s")
    return 0


def _scale(cluster: Cluster, args: argparse.Namespace) -> int:
    wishes = cluster_scale.parse(args.pools)
    release = cluster_release.read(cluster, args.release)
    cluster_scale.check(release, wishes)
    changes = [cluster_scale.apply(cluster, release, wish) for wish in wishes]
    if args.json:
        show.print_json({"changes": [asdict(change) for change in changes]})
        return 0
    for change in changes:
        print(f"{change.component}: {change.object} {change.before} → {change.after}")
    print("the next `helm upgrade` sets the values' numbers again; `nvila cluster wait` follows", file=sys.stderr)
    return 0


def _bundle(cluster: Cluster, args: argparse.Namespace) -> int:
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    path = args.output or Path(f"nvila-bundle-{cluster.namespace}-{args.release}-{stamp}.tar.gz")
    intent = Intent(args.release, wants_gpus=not args.cpu)
    with show.waiting("collecting"):
        made = cluster_bundle.write(cluster, intent, path, version("nvila"), lambda _: None)
    if args.json:
        show.print_json(made)
        return 0
    for failure in made["not_collected"]:
        print(f"  without {failure}", file=sys.stderr)
    print(f"{made['file']}  {made['bytes'] / 1024:.0f} KiB, {len(made['holds'])} files, secrets left out")
    return 0
