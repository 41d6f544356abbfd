"""What can be typed for the verbs of operations; the work is in the modules of their names."""

from __future__ import annotations

import argparse
from pathlib import Path


def capacity(verb: argparse.ArgumentParser) -> None:
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    size = actions.add_parser("size", help="GPUs, Redis servers and network for a load, or what GPUs can serve")
    _common(size)
    size.add_argument("--mix", metavar="NAME", help="text, image, clip, video, camera, mixed (default: each)")
    of = size.add_mutually_exclusive_group()
    of.add_argument("--rate", type=float, nargs="+", metavar="R", help="requests per second to size for")
    of.add_argument("--gpus", type=int, nargs="+", metavar="N", help="GPUs to fill (default: 1 to 2,048)")
    size.add_argument("--load", type=float, default=0.7, metavar="X", help="share of the throughput to plan with (0.7)")
    size.add_argument(
        "--keep", type=float, default=600, metavar="S", help="seconds that tokens are to stay (%(default)s)"
    )
    size.add_argument("--redis-memory", type=float, default=64, metavar="GB", help="of one Redis server (%(default)s)")
    size.add_argument("--markdown", action="store_true", help="print Markdown tables")
    recorded = actions.add_parser("recordings", help="recorded cameras: streams per GPU, what is kept, the traffic")
    recorded.add_argument("--model", metavar="NAME", help="a published model (default: NVILA-8B-Video)")
    recorded.add_argument("--gpu", default="h100", metavar="NAME", help="of the vision pool (%(default)s)")
    recorded.add_argument("--tiles-per-s", type=float, metavar="X", help="measured: tower tiles per second of a pod")
    recorded.add_argument(
        "--load", type=float, default=0.7, metavar="X", help="share of the throughput to plan with (%(default)s)"
    )
    recorded.add_argument("--fps", type=float, nargs="+", metavar="X", help="sampled frames per second (default: five)")
    recorded.add_argument(
        "--still", type=float, nargs="+", metavar="X", help="share of time in which nothing changes (default: 0, 0.8)"
    )
    recorded.add_argument("--chunk-s", type=float, default=32, metavar="S", help="length of a chunk (%(default)s)")
    recorded.add_argument(
        "--floor-s", type=float, default=60, metavar="S", help="a still scene is encoded again after (%(default)s)"
    )
    recorded.add_argument(
        "--footage-mbit", type=float, default=4, metavar="X", help="of a camera, Mbit/s (%(default)s)"
    )
    recorded.add_argument("--markdown", action="store_true", help="print a Markdown table")
    recorded.add_argument("--json", action="store_true", help="print JSON, for programs")
    simulate = actions.add_parser("simulate", help="replay a load against both pools and their autoscalers")
    _common(simulate)
    simulate.add_argument("trace", nargs="?", type=Path, metavar="TRACE", help="JSON, JSON lines or CSV: time, kind, …")
    simulate.add_argument("--example", choices=["image-to-text", "sinusoid", "steps"], help="a made-up load instead")
    simulate.add_argument("--scale", type=float, default=1.0, metavar="X", help="of the example's load")
    simulate.add_argument("--seed", type=int, default=0, metavar="N", help="of the example's chance")
    simulate.add_argument("-f", "--values", type=Path, action="append", default=[], metavar="FILE", help="chart values")
    simulate.add_argument("--decode-scaler", choices=["ray", "keda"], help="whose rules scale decode (default: ray)")
    simulate.add_argument("--vision-pods", metavar="A..B", help="least and most, instead of the values'")
    simulate.add_argument("--decode-pods", metavar="A..B", help="least and most, instead of the values'")
    simulate.add_argument(
        "--vision-start", type=float, default=60, metavar="S", help="until a pod is ready (%(default)s)"
    )
    simulate.add_argument("--decode-start", type=float, default=120, metavar="S", help="likewise (%(default)s)")
    simulate.add_argument(
        "--max-ongoing", type=int, metavar="N", help="requests of one decode replica (default: as the values have it)"
    )
    simulate.add_argument("--scale-to-zero", action="store_true", help="let the vision pool sleep")
    simulate.add_argument(
        "--metrics-missing", action="append", default=[], metavar="A-B", help="seconds in which no metrics come"
    )
    simulate.add_argument("--png", type=Path, metavar="FILE", help="draw load, pods, queues and times to first token")
    gpus = actions.add_parser("gpus", help="the GPUs that are known, and what is assumed of them")
    gpus.add_argument("--model", metavar="NAME", help="a published model (default: NVILA-8B-Video)")
    gpus.add_argument("--markdown", action="store_true", help="print a Markdown table")
    gpus.add_argument("--json", action="store_true", help="print JSON, for programs")


def _common(action: argparse.ArgumentParser) -> None:
    action.add_argument("--model", metavar="NAME", help="a published model (default: NVILA-8B-Video)")
    action.add_argument(
        "--gpu", default="h100", metavar="NAME", help="of both pools (%(default)s; `nvila capacity gpus`)"
    )
    action.add_argument("--vision-gpu", metavar="NAME", help="of the vision pool")
    action.add_argument("--decode-gpu", metavar="NAME", help="of the decode pool")
    action.add_argument(
        "--tiles-per-s", type=float, metavar="X", help="measured: tower tiles per second of a vision pod"
    )
    action.add_argument(
        "--positions-per-s", type=float, metavar="X", help="measured: prompt positions per second of a decode replica"
    )
    action.add_argument("--json", action="store_true", help="print JSON, for programs")


def cluster(verb: argparse.ArgumentParser) -> None:
    actions = verb.add_subparsers(dest="action", required=True, metavar="ACTION")
    doctor = actions.add_parser(
        "doctor", help="what the cluster lacks, before and after installation, and what mends it"
    )
    doctor.add_argument("--cpu", action="store_true", help="no GPUs are wanted")
    actions.add_parser("status", help="pools, replicas, backlogs, versions")
    wait = actions.add_parser("wait", help="until every pool is ready")
    wait.add_argument("--timeout", type=float, default=900, metavar="S", help="longest wait (%(default)s s)")
    scale = actions.add_parser("scale", help="change the size of pools: vision=4 decode=2..8")
    scale.add_argument("pools", nargs="+", metavar="POOL=N", help="one number, or least..most of an autoscaler")
    bundle = actions.add_parser("bundle", help="one archive for whoever is to help, without secrets")
    bundle.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: nvila-bundle-….tar.gz here")
    bundle.add_argument("--cpu", action="store_true", help="no GPUs are wanted")
    for action in actions.choices.values():
        action.add_argument("-n", "--namespace", metavar="NAME", help="default: the context's")
        action.add_argument("--release", default="nvila", metavar="NAME", help="Helm release (default: %(default)s)")
        action.add_argument("--context", metavar="NAME", help="of the kubeconfig (default: its current one)")
        action.add_argument("--kubeconfig", metavar="FILE", help="default: KUBECONFIG, or ~/.kube/config")
        action.add_argument("--json", action="store_true", help="print one JSON object, for programs")
