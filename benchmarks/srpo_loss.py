"""Peak memory and time of SRPO's distillation: top-k divergence and teacher entropy, forward and backward.

    python -m benchmarks.srpo_loss                           # CPU, about 8 minutes
    python -m benchmarks.srpo_loss --student 4096 --teacher 4096 --most 60 --repeats 5      # a GPU

`full logits` keeps the (N, V) logits of teacher and student, as TRL's SDPO and verl do; `ours` keeps the teacher's
hidden states and makes each model's logits once for the divergence, in tiles of less than 1 GB. Measured as in
`benchmarks.va_opd_loss`. A path is left out if it needs more than --most GiB. Writes
benchmarks/results/srpo_loss.json.
"""

import torch

from benchmarks import tables
from benchmarks.machine import machine
from benchmarks.va_opd_loss import Found, measure, parser
from common.runs import atomic_write_json
from srpo import SRPOConfig, objective
from srpo.divergence import chunked_divergence, chunked_entropy
from srpo.lm_head import LMHead

PATHS = {"full logits": 6.5, "ours": 0.0}  # (N, V) tensors of float32 that the peak may hold


def loss_of(name: str, s_hidden, s_weight, t_hidden, t_weight) -> torch.Tensor:
    top_k = SRPOConfig.distillation_topk
    if name == "ours":
        student, teacher = (LMHead(weight, None, 1.0, None) for weight in (s_weight, t_weight))
        entropy = chunked_entropy(teacher, t_hidden)
        weights = objective.entropy_weights(entropy, torch.ones_like(entropy))
        divergence, _ = chunked_divergence(student, s_hidden, teacher, t_hidden, weights, top_k=top_k)
    else:
        with torch.no_grad():
            teacher_logits = t_hidden @ t_weight.T
            entropy = objective.teacher_entropy(teacher_logits)
        weights = objective.entropy_weights(entropy, torch.ones_like(entropy))
        divergence = objective.jsd_topk_tail(s_hidden @ s_weight.T, teacher_logits, top_k)
    return (weights * divergence).mean()


def main(argv: list[str] | None = None) -> None:
    asked = parser("srpo_loss", [512, 1024, 2048, 8192])
    asked.description = __doc__
    options = asked.parse_args(argv)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    result = {"settings": settings, **machine("trl")}

    def save(found: Found) -> None:
        atomic_write_json(options.out, result | {"paths": found})

    widths = [options.student, options.teacher]
    measure(loss_of, PATHS, options.rows, widths, options.repeats, options.most, save)
    print(tables.of_file("srpo_loss", options.out))


if __name__ == "__main__":
    main()
