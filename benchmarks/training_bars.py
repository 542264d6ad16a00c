"""What the measured runs of train_vs_trl.py are held against. `answers` are the workers' answers by the name of the run."""

from __future__ import annotations

import statistics
from dataclasses import replace

from peers.candidates import TRL_DEFAULT, Peer
from peers.runner import Answer
from report import Bar
from workload import Config, step_flops

DROPOUT = 0.05
BEST_PEER_BAR, TRL_DEFAULT_BAR = 4.2, 7.0
LEAN_SPEED_BAR, LEAN_MEMORY_BAR = 3.8, 0.42
LOSS_BAR = 2.0
MATRIX_RATE_AIM = 0.85

Answers = dict[str, list[Answer]]


def ours_name(memory: str, dropout: float = 0.0) -> str:
    return f"ours {memory}" + (f" dropout={dropout}" if dropout else "")


def timed_steps(answer: Answer) -> dict[tuple[int, ...], Answer]:
    """All steps but those that warm up, by the rows that they trained."""
    return {tuple(sorted(step["rows"])): step for step in answer["steps"][answer["warm_steps"] :]}


def speed(answer: Answer, rows: set[tuple[int, ...]] | None = None) -> float:
    """Unpadded tokens/s over the timed steps, or over those of them that trained the given rows."""
    steps = [step for key, step in timed_steps(answer).items() if rows is None or key in rows]
    return float(sum(step["tokens"] for step in steps) / sum(step["seconds"] for step in steps))


def speed_beside(ours: Answer, peer: Answer) -> float:
    """Our tokens/s on the rows that the peer was timed on; on all timed rows where the peer has grouped them anew."""
    peer_rows = set(timed_steps(peer))
    return speed(ours, peer_rows if peer_rows <= timed_steps(ours).keys() else None)


def fastest(answers: Answers, peers: list[Peer]) -> Peer:
    """The peer with the highest median speed."""
    return max(peers, key=lambda peer: statistics.median(map(speed, answers[peer.name])))


def speed_bar(answers: Answers, label: str, ours: str, peers: list[Peer], bar: float) -> Bar:
    """Ours against the fastest of the peers: the median of the ratios of the alternations."""
    rival = fastest(answers, peers)
    theirs = answers[rival.name]
    mine = answers[ours] if len(answers[ours]) > 1 else answers[ours] * len(theirs)  # dropout runs once by default
    pairs = [(speed_beside(one, other), speed(other)) for one, other in zip(mine, theirs, strict=True)]
    ours_median, peer_median = (statistics.median(speeds) for speeds in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    peer_text = f"{peer_median:.1f} tok/s ({rival.name})"
    return Bar(f"{ours} against {label}", f"{ours_median:.1f} tok/s", peer_text, ratio, bar)


def memory_bar(answers: Answers, mode: str, rival: Peer) -> Bar:
    """Peak memory of ours against the peer's, over runs with the same number of timed steps."""
    theirs, mine = answers[rival.name], answers[ours_name(mode)]
    alike = [answer for answer in mine if len(timed_steps(answer)) == len(timed_steps(theirs[0]))] or mine
    ours_bytes = statistics.median(answer["peak_bytes"] for answer in alike)
    peer_bytes = statistics.median(answer["peak_bytes"] for answer in theirs)
    ours_text, peer_text = f"{ours_bytes / 1e9:.2f} GB", f"{peer_bytes / 1e9:.2f} GB ({rival.name})"
    return Bar(f"peak memory, {mode}", ours_text, peer_text, ours_bytes / peer_bytes, LEAN_MEMORY_BAR, at_least=False)


def loss_bar(memory: str, ours: Answer, references: dict[str, Answer]) -> Bar:
    """The largest difference of a step's loss from TRL's in float32, by TRL's own between bf16 and float32."""
    exact = {tuple(step["rows"]): float(step["loss"]) for step in references["fp32"]["steps"]}

    def largest_difference(answer: Answer) -> float:
        return max(abs(float(step["loss"]) - exact[tuple(step["rows"])]) for step in answer["steps"])

    difference, own = largest_difference(ours), largest_difference(references["bf16"])
    ratio = difference / own if own else float("inf")
    ours_text, peer_text = f"{difference:.5f} nats", f"{own:.5f} nats (TRL bf16)"
    return Bar(f"losses from TRL fp32, {memory}", ours_text, peer_text, ratio, LOSS_BAR, at_least=False)


def path_bar(answers: Answers) -> Bar:
    """How many modules fell back to PEFT in any run of ours; a run that names no paths counts as one."""
    paths = [answer.get("paths") or {"peft": 1} for name in answers for answer in ours_runs(answers, name)]
    fallen = max(sum(count for path, count in taken.items() if path.startswith("peft")) for taken in paths)
    ours_text = f"{fallen} of {max(sum(taken.values()) for taken in paths)} modules through PEFT"
    return Bar("paths", ours_text, "0 modules", float(fallen), 0.0, at_least=False)


def ours_runs(answers: Answers, name: str) -> list[Answer]:
    return answers[name] if name.startswith("ours ") else []


def matrix_rate_bar(ours: list[Answer], mode: str, rate: Answer, config: Config) -> Bar:
    """What share of the fastest torch.mm at the model's shapes a step reaches, counting only what it cannot avoid."""
    precision = ours[0].get("precision", "bf16")
    rates = [
        step_flops(config, step["tokens"], step["labelled_tokens"]) / step["seconds"] / 1e9
        for answer in ours
        for step in timed_steps(answer).values()
    ]
    dtype = max(rate_dtypes(rate), key=lambda name: rate[name]["best"]) if precision == "int16" else precision
    reached, best = statistics.median(rates), rate[dtype]["best"]
    name, peer_text = f"{precision} matrix rate, {mode}", f"{best:.0f} GFLOP/s (torch.mm in {dtype})"
    return Bar(name, f"{reached:.0f} GFLOP/s", peer_text, reached / best, MATRIX_RATE_AIM, is_aim=True)


def rate_dtypes(rate: Answer) -> list[str]:
    return [name for name, value in rate.items() if isinstance(value, dict)]


def judge(
    answers: Answers,
    peers: list[Peer],
    references: dict[str, Answer] | None,
    mode: str,  # what training.memory=auto takes on this machine
    rate: Answer,
    config: Config,
) -> list[Bar]:
    """Every bar that the machine's memory allowed to measure."""
    bars = []
    for dropout in (0.0, DROPOUT):
        with_dropout = [replace(peer, dropout=dropout) for peer in peers]
        if any(peer.name not in answers for peer in with_dropout):
            with_dropout = peers  # only --full runs the peers with dropout; without it they are no slower
        ours = ours_name(mode, dropout)
        bars.append(speed_bar(answers, "best peer", ours, with_dropout, BEST_PEER_BAR))
        if default := [peer for peer in with_dropout if replace(peer, dropout=0.0) == TRL_DEFAULT]:
            bars.append(speed_bar(answers, "TRL's default", ours, default, TRL_DEFAULT_BAR))
    bars.append(speed_bar(answers, "best peer", ours_name("lean"), peers, LEAN_SPEED_BAR))
    bars.append(speed_bar(answers, "best peer", ours_name("least"), peers, LEAN_SPEED_BAR))
    bars += [memory_bar(answers, lean, fastest(answers, peers)) for lean in ("lean", "least")]
    for memory in dict.fromkeys([mode, "lean"]):
        if references:
            bars.append(loss_bar(memory, answers[ours_name(memory)][0], references))
    bars.append(path_bar(answers))
    bars.append(matrix_rate_bar(answers[ours_name(mode)], mode, rate, config))
    return bars
