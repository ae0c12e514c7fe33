"""A teacher behind a server: the equations of the approximate modes, the client, whole steps, a run that resumes.

The server is a small one of this file that speaks the part of vLLM's protocol that is used, and computes its numbers
with a tiny teacher from the ids and images that it gets. tests/test_vllm.py has vLLM itself.
"""

import base64
import copy
import io
import json
import math
import random
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby

import pytest
import torch
import va_opd_trainers as tests
from PIL import Image

from va_opd import VAOPDConfig, VAOPDTrainer, objective, served, train

F64 = torch.float64


# --- equations ----------------------------------------------------------------


def distributions(vocab: int = 7, rows: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, rows, vocab, generator=generator, dtype=F64)
    return logits[0].requires_grad_(), logits[1].log_softmax(-1)


def gradient(value: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]


def test_sampled_token_kl_has_the_value_and_the_gradient_of_the_kl_in_expectation():
    logits, teacher = distributions()
    student = logits.log_softmax(-1)
    each = objective.sampled_token_kl(student, teacher)  # every token of the vocabulary once, so the mean is exact
    expected, exact = (student.detach().exp() * each).sum(-1), objective.reverse_kl(logits, teacher)
    torch.testing.assert_close(expected, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(expected, logits), gradient(exact, logits), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(each, student - teacher)
    naive = (student.detach().exp() * (student - teacher)).sum(-1)  # k1 differentiated: the teacher is lost
    assert gradient(naive, logits).abs().max() < 1e-12


def test_sampled_token_kl_is_biased_for_a_sharper_sampler_and_0_where_the_models_agree():
    logits, teacher = distributions()
    student = logits.log_softmax(-1)
    sharper = (logits.detach() / 0.7).softmax(-1)
    biased = gradient((sharper * objective.sampled_token_kl(student, teacher)).sum(-1), logits)
    assert (biased - gradient(objective.reverse_kl(logits, teacher), logits)).abs().max() > 0.05
    same = (sharper * objective.sampled_token_kl(student, student.detach())).sum(-1)
    assert gradient(same, logits).abs().max() == 0


def test_sampled_tokens_teach_a_student():
    """A policy gradient is noisy, so on a table of logits, with many samples."""
    logits, teacher = distributions()
    before, optimizer = objective.reverse_kl(logits, teacher).mean().item(), torch.optim.Adam([logits], lr=0.05)
    torch.manual_seed(0)
    for _ in range(300):
        student = logits.log_softmax(-1)
        tokens = student.detach().exp().multinomial(64, replacement=True)
        loss = objective.sampled_token_kl(student.gather(1, tokens), teacher.gather(1, tokens)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert objective.reverse_kl(logits, teacher).mean() < 0.02 * before


def reference_partition_kl(logits: torch.Tensor, teacher: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """One place: probabilities of the tokens and of the sum of all others, by their definition."""
    rest = [i for i in range(len(logits)) if i not in tokens]
    bins = [[i] for i in tokens] + ([rest] if rest else [])
    p, q = ([probabilities[b].sum() for b in bins] for probabilities in (logits.softmax(-1), teacher.exp()))
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("count", range(1, 8))
def test_partition_kl_against_its_definition(count):
    logits, teacher = distributions()
    tokens = teacher.topk(count).indices
    student = logits.log_softmax(-1).gather(1, tokens)
    padded = [torch.cat([x, torch.full((5, 2), math.nan, dtype=F64)], 1) for x in (student, teacher.gather(1, tokens))]
    kept = torch.arange(count + 2).expand(5, -1) < count
    ours = objective.partition_kl(*padded, kept)
    places = zip(logits, teacher, tokens.tolist(), strict=True)
    reference = torch.stack([reference_partition_kl(*place) for place in places])
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient(ours, logits), gradient(reference, logits), rtol=1e-6, atol=1e-9)


def test_partition_kl_grows_with_k_up_to_the_kl():
    logits, teacher = distributions(vocab=40, rows=30, seed=1)
    exact, student = objective.reverse_kl(logits, teacher), logits.log_softmax(-1)
    order, values = teacher.argsort(1, descending=True), []
    for count in range(1, 41):
        ours, theirs = student.gather(1, order[:, :count]), teacher.gather(1, order[:, :count])
        values.append(objective.partition_kl(ours, theirs, torch.ones_like(ours).bool()))
    steps = torch.stack(values).diff(dim=0)
    assert (steps > -1e-9).all()
    assert (values[0] < exact).all()
    torch.testing.assert_close(values[-1], exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(values[-1], logits), gradient(exact, logits), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_partition_kl_is_finite_when_nothing_is_left_for_the_rest(dtype):
    logits = torch.tensor([[200.0, 0, 0], [0, 0, -200.0], [0, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0, 0, 200.0], [0, 0, -300.0], [90.0, 0, 0]], dtype=dtype).log_softmax(-1)
    for count in (1, 2, 3):
        student = logits.log_softmax(-1)[:, :count]
        kl = objective.partition_kl(student, teacher[:, :count], torch.ones(3, count).bool())
        assert kl.isfinite().all() and (kl > -1e-6).all()
        assert gradient(kl, logits).isfinite().all()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("biased", [True, False])
def test_token_logps_in_parts_against_the_whole(softcap, biased):
    torch.manual_seed(0)
    hidden, weight = torch.randn(11, 6).requires_grad_(), torch.randn(9, 6).requires_grad_()
    bias = torch.randn(9).requires_grad_() if biased else None
    tokens, factors = torch.randint(9, (11, 3)), torch.randn(11, 3)
    ours, entropy = objective.token_logps(hidden, weight, tokens, bias, 0.5, softcap, rows=4)
    logits = 0.5 * (hidden.double() @ weight.double().T + (0 if bias is None else bias.double()))
    logps = (logits if softcap is None else softcap * (logits / softcap).tanh()).log_softmax(-1)
    torch.testing.assert_close(ours, logps.gather(1, tokens).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, -(logps.exp() * logps).sum(-1).float(), rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad
    whole, _ = objective.token_logps(hidden, weight, tokens)
    torch.testing.assert_close(whole[:, 0], objective.sampled_logps(hidden, weight, tokens[:, 0]))
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    gradients = torch.autograd.grad((factors * ours).sum(), leaves)
    references = torch.autograd.grad((factors * logps.gather(1, tokens)).sum(), leaves)
    for a, b in zip(gradients, references, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- a server ----------------------------------------------------------------


class Served:
    """Answers as vLLM does, from a transformers model; `change` alters the reply and `fail` the connection."""

    def __init__(self, model, processor):
        self.model, self.processor, self.requests = model.eval(), processor, []
        self.change, self.fail, self.lock = (lambda reply: reply), (lambda handler: False), threading.Lock()

    @torch.no_grad()
    def reply(self, request: dict) -> dict:
        images = [Image.open(io.BytesIO(base64.b64decode(part["url"].split(",")[1]))) for part in request.get(
            "content_parts", []
        )]  # fmt: skip
        fields, ids = {}, request["token_ids"]
        if images:
            fields = dict(self.processor.image_processor(images=images, return_tensors="pt"))
            pad, merge = self.processor.image_token_id, self.processor.image_processor.merge_size**2
            counts = iter((fields["image_grid_thw"].prod(1) // merge).tolist())
            ids = [x for i in ids for x in ([i] * next(counts) if i == pad else [i])]
            fields["mm_token_type_ids"] = (torch.tensor([ids]) == pad).long()
        logps = self.model(input_ids=torch.tensor([ids]), **fields).logits[0].log_softmax(-1)
        places, k = [None], request["sampling_params"]["prompt_logprobs"]
        for place, token in enumerate(ids[1:]):
            top = [token, *(logps[place].topk(k).indices.tolist() if k else [])]
            places.append({str(i): {"logprob": logps[place, i].item(), "rank": 1} for i in top})
        return {"prompt_token_ids": ids, "prompt_logprobs": places}


@contextmanager
def serving(answers: Served, port: int = 0):
    class Handler(BaseHTTPRequestHandler):
        def _answer(self, code: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self._answer(200 if self.path == "/v1/models" else 404, {"data": [{"id": "teacher"}]})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with answers.lock:
                answers.requests.append(request)
                if answers.fail(self):
                    return
                reply = answers.change(answers.reply(request))
            self._answer(200 if self.path == "/inference/v1/generate" else 404, reply)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def parts():
    return tests.models()


@pytest.fixture
def teacher_server(parts, monkeypatch):
    monkeypatch.setattr(served, "PAUSES", (0.01, 0.01))
    answers = Served(parts[1], parts[2])
    with serving(answers) as address:
        answers.address = address
        yield answers


@pytest.fixture
def make(tmp_path, parts, teacher_server):
    """A trainer that has the teacher as a server only, or with `teacher_model` also as a model."""

    def build(mode: str = "sampled_token", teacher_model=None, rows=None, **overrides) -> VAOPDTrainer:
        folder = overrides.pop("output_dir", tmp_path)
        student = overrides.pop("student", parts[0])
        if mode == "exact":
            return tests.build(folder, rows, parts=parts, **overrides)
        settings = {"teacher_server": teacher_server.address + "/v1/", "teacher_mode": mode, **overrides}
        return tests.build(folder, rows, parts=(student, teacher_model, parts[2]), **settings)

    return build


def last_line(trainer: VAOPDTrainer) -> dict[str, float]:
    return {name: sum(values) / len(values) for name, values in trainer._metrics["train"].items()}


# --- steps ----------------------------------------------------------------


@pytest.mark.parametrize("rows", [tests.image_rows, tests.mixed_rows])
@pytest.mark.parametrize("pixelate_at", ["model", "raw"])
def test_va_and_coefficients_are_those_of_the_local_teacher(make, monkeypatch, rows, pixelate_at):
    tests.fixed_rollouts(monkeypatch)
    local, remote = (make(mode, rows=rows(4), pixelate_at=pixelate_at) for mode in ("exact", "sampled_token"))
    for trainer in (local, remote):
        tests.step(trainer)
    assert local.last_rollouts["va"].max() > 0.01
    torch.testing.assert_close(remote.last_rollouts["va"], local.last_rollouts["va"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        remote._buffered_inputs[0]["coefficients"], local._buffered_inputs[0]["coefficients"], rtol=1e-3, atol=1e-5
    )
    assert last_line(remote)["va/cells"] == last_line(local)["va/cells"]


def test_teacher_topk_of_the_whole_vocabulary_is_the_exact_mode(make, parts, monkeypatch):
    tests.fixed_rollouts(monkeypatch)
    steps = [
        tests.step(make(mode, gradient_accumulation_steps=2, per_device_train_batch_size=4, **options))
        for mode, options in (("exact", {}), ("teacher_topk", {"teacher_top_k": len(parts[2].tokenizer)}))
    ]
    tests.assert_same_step(*steps, loss_tolerance=1e-5, gradient_tolerance=1e-5)


def test_teacher_topk_is_a_lower_bound_that_grows(make, monkeypatch):
    tests.fixed_rollouts(monkeypatch)
    settings = [("teacher_topk", {"teacher_top_k": k}) for k in (1, 5, 20)] + [("exact", {})]
    losses = [tests.step(make(mode, weighting="none", **options))[0] for mode, options in settings]
    assert losses == sorted(losses)
    assert losses[0] < losses[2] < losses[3]


def test_sampled_token_against_an_independent_computation(make, parts, monkeypatch):
    tests.fixed_rollouts(monkeypatch)
    trainer = make()
    loss, gradients, (batch,) = tests.step(trainer)
    student, teacher, processor = parts
    vocab, tokens = len(processor.tokenizer), batch["completion_ids"][..., None]
    ours = tests.response_logits(student, batch)[..., :vocab].log_softmax(-1).gather(-1, tokens)[..., 0]
    with torch.no_grad():
        theirs = tests.response_logits(teacher, batch)[..., :vocab].log_softmax(-1).gather(-1, tokens)[..., 0]
    k1 = (ours - theirs).detach()
    assert loss == pytest.approx((batch["coefficients"] * k1).sum().item() / 2, rel=1e-4)
    reference = tests.gradients_of((batch["coefficients"] * k1 * ours).sum() / 2, student)
    for name, expected in reference.items():
        torch.testing.assert_close(gradients[name], expected.to(gradients[name]), rtol=1e-3, atol=1e-6)


def test_the_student_learns_from_a_server(make):
    """Measured by the exact KL, on prompts of which it has seen half."""
    options = {"temperature": 1.0, "top_p": 1.0, "weighting": "none"}
    schedule = {"lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    trainer = make("teacher_topk", max_steps=20, learning_rate=1e-2, **options, **schedule)
    before = tests.step(make("exact", rows=tests.image_rows(8), **options))[0]
    trainer.train()
    after = tests.step(make("exact", rows=tests.image_rows(8), **options))[0]
    assert after < 0.5 * before


def test_what_is_sent_holds_ids_and_two_views_and_no_more(make, teacher_server, monkeypatch):
    tests.fixed_rollouts(monkeypatch)
    tests.step(make("teacher_topk", teacher_top_k=3, rows=tests.mixed_rows(4)))
    kinds = [("content_parts" in r, r["sampling_params"]["prompt_logprobs"]) for r in teacher_server.requests]
    # Two prompts of four rollouts, one prompt with an image: true views with the top k, degraded ones without
    assert {kind: kinds.count(kind) for kind in kinds} == {(False, 3): 4, (True, 3): 4, (True, 0): 4}
    pad = 5
    for request in teacher_server.requests:
        assert set(request) <= {"model", "token_ids", "sampling_params", "return_token_ids", "content_parts"}
        assert [len(list(run)) for token, run in groupby(request["token_ids"]) if token == pad] in ([], [1])


def test_without_measuring_va_only_true_views_are_sent(make, teacher_server, monkeypatch):
    tests.fixed_rollouts(monkeypatch)
    measured = tests.step(make(weighting="none"))
    sent = len(teacher_server.requests)
    teacher_server.requests.clear()
    trainer = make(weighting="none", measure_va=False)
    tests.assert_same_step(tests.step(trainer), measured)
    assert (sent, len(teacher_server.requests)) == (16, 8)
    logged = {name for name in trainer._metrics["train"] if name.startswith(("va/", "kl/")) or "degraded" in name}
    assert logged == {"time/degraded_images"}  # of the PNGs of the true ones


def test_the_comparison_with_a_local_teacher_has_both_views_all_the_same(make, parts, teacher_server, monkeypatch):
    tests.fixed_rollouts(monkeypatch)
    trainer = make(teacher_model=copy.deepcopy(parts[1]), weighting="none", measure_va=False)
    for expected in (16, 8):  # the first step compares
        teacher_server.requests.clear()
        trainer._step = 0
        tests.step(trainer)
        assert len(teacher_server.requests) == expected
    assert last_line(trainer)["teacher/parity_mean"] < 1e-4


def test_log_probabilities_are_not_rounded_by_autocast(make, monkeypatch):
    """In bfloat16 they would be off by more than what a step changes."""
    rounded, token_logps = [], served.objective.token_logps

    def recorded(*arguments):
        rounded.append(torch.is_autocast_enabled("cpu"))
        return token_logps(*arguments)

    monkeypatch.setattr(served.objective, "token_logps", recorded)
    tests.step(make(bf16=True))
    assert rounded == [False]


def test_lora_and_bfloat16_students_train_on_a_server(make):
    config = tests.peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = make("teacher_topk", peft_config=config, bf16=True, doctor_steps=1)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["grad_norm"] > 0
    assert line["va/null"] == 0


# --- parity ----------------------------------------------------------------


def test_parity_is_checked_once_and_logged(make, parts, capsys):
    trainer = make(teacher_model=parts[1], rows=tests.mixed_rows(4))
    trainer.train()
    assert capsys.readouterr().out.count("[teacher] the served and the local teacher differ by") == 1
    assert trainer.state.log_history[0]["teacher/parity_mean"] < 1e-5
    assert trainer.state.log_history[0]["teacher/parity_max"] < 1e-4
    assert "teacher/parity_mean" not in trainer.state.log_history[1]


def test_a_server_that_answers_otherwise_each_time_shows_in_the_null(make, teacher_server):
    """The doctor warns of it: what differs without a reason is no VA."""
    noise = random.Random(0)

    def change(reply):
        for place in filter(None, reply["prompt_logprobs"]):
            for entry in place.values():
                entry["logprob"] -= 0.1 * noise.random()
        return reply

    teacher_server.change = change
    trainer = make(doctor_steps=1, max_steps=1)
    trainer.train()
    assert 0.01 < trainer.state.log_history[0]["va/null"] < 0.11


def test_the_null_is_of_a_prompt_with_an_image(make, teacher_server, monkeypatch):
    tests.fixed_rollouts(monkeypatch)
    tests.step(make(rows=tests.mixed_rows(2), shuffle_dataset=False, doctor_steps=1))
    kinds = ["content_parts" in request for request in teacher_server.requests]
    assert sorted(kinds[:8]) == [False] * 4 + [True] * 4 and kinds[8:12] == [True] * 4


def test_another_teacher_on_the_server_is_refused_before_the_first_update(make, parts):
    other = tests.models(sharp=7.0)[1]
    trainer = make(teacher_model=other)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=r"differ by .* nats a token .*teacher_parity_limit=0.05.*revision"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    make(teacher_model=other, teacher_parity_limit=100.0).train()


@pytest.mark.parametrize("rows", [tests.image_rows, tests.mixed_rows])
def test_degraded_images_that_the_server_does_not_get_are_refused(make, parts, teacher_server, monkeypatch, rows):
    """Also where the first prompt has no image, of which both views are one."""
    views = served.ServedTeacher._image_urls
    monkeypatch.setattr(
        served.ServedTeacher, "_image_urls", lambda *a: [[(t, t) for t, _ in row] for row in views(*a)]
    )
    trainer = make(teacher_model=parts[1], teacher_parity_limit=1e-3, rows=rows(4), shuffle_dataset=False)
    with pytest.raises(ValueError, match="given the degraded ones"):
        trainer.train()
    logged = last_line(trainer)
    assert 1e-3 < logged["teacher/parity_mean"] < logged["teacher/parity_max"]


# --- what a server can do wrong ----------------------------------------------------------------


def with_last(value):
    def change(reply):
        reply["prompt_logprobs"][-1][str(reply["prompt_token_ids"][-1])]["logprob"] = value
        return reply

    return change


def without_last(reply):
    reply["prompt_logprobs"][-1] = {"50": {"logprob": -1.0}}
    return reply


def with_another_id(reply):
    return {**reply, "prompt_token_ids": [*reply["prompt_token_ids"][:3], 99, *reply["prompt_token_ids"][4:]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_last(math.nan), "log-probability nan"),
        (with_last(None), "log-probability None"),
        (with_last(served.VLLM_MINUS_INFINITY), "log-probability -9999"),
        (with_last(3.5), "raw_logits"),
        (without_last, "log-probability None"),
        (with_another_id, "first difference is at place 3: .*--mm-processor-kwargs"),
        (lambda reply: {}, "scored 0 tokens"),
    ],
)
def test_a_bad_answer_is_one_clear_sentence(make, teacher_server, change, message):
    teacher_server.change = change
    with pytest.raises(ValueError, match=message):
        make().train()


def refuse(code: int):
    return lambda handler: handler._answer(code, {"error": {"message": "no such thing"}}) or True


def cut(handler) -> bool:
    """Ends in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    return bool(handler.wfile.write(b"{"))


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        (refuse(404), ValueError, "404.*no such thing.*--enable-scale-out"),
        (refuse(400), ValueError, "400.*no such thing"),
        (refuse(500), ConnectionError, "HTTP 500.*3 requests in a row.*goes on from the last checkpoint"),
        (lambda handler: handler.connection.close() or True, ConnectionError, "does not answer"),
        (cut, ConnectionError, r"does not answer \(IncompleteRead"),
    ],
)
def test_a_failing_server_is_one_clear_sentence(make, teacher_server, fail, error, message):
    teacher_server.fail = fail
    with pytest.raises(error, match=message):
        make().train()


def test_after_a_refusal_the_other_requests_are_not_sent(monkeypatch):
    sent = []

    def send(path, request=None):
        sent.append(request)
        if len(sent) > 1:
            time.sleep(0.2)  # in which what waits is cancelled
        raise ValueError("refused")

    client = object.__new__(served.TeacherServer)
    client._send = send
    monkeypatch.setattr(served, "REQUESTS_AT_ONCE", 1)
    with pytest.raises(ValueError, match="refused"):
        client.score([{}] * 20)
    assert len(sent) < 10


def test_a_short_failure_is_survived(make, teacher_server):
    failures = iter([True, True])
    teacher_server.fail = lambda handler: next(failures, False) and refuse(503)(handler)
    make().train()


def test_a_server_that_is_silent_or_absent_is_one_clear_sentence(make, teacher_server):
    teacher_server.fail = lambda handler: threading.Event().wait(1.0) or True
    with pytest.raises(ConnectionError, match="timed out"):
        make(teacher_server_timeout=0.05, per_device_train_batch_size=4).train()
    with pytest.raises(ConnectionError, match=r"127.0.0.1:1 does not answer"):
        make(teacher_server="http://127.0.0.1:1")


def test_a_run_whose_server_died_resumes_to_the_straight_runs_end(make, teacher_server, tmp_path):
    """Rollouts are drawn by the student, so the weights would differ if the resumed state were another."""

    def run(folder: str) -> VAOPDTrainer:
        settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
        return make(student=tests.models()[0], output_dir=tmp_path / folder, **settings)

    straight = run("straight")
    straight.train()
    a_step = len(teacher_server.requests) // 3
    teacher_server.requests.clear()
    teacher_server.fail = lambda handler: len(teacher_server.requests) > a_step + 3 and refuse(500)(handler)
    with pytest.raises(ConnectionError, match="last checkpoint"):
        run("broken").train()
    teacher_server.fail = lambda handler: False
    resumed = run("broken")
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-1"))
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7, msg=name)


def test_without_the_parity_check_the_command_loads_no_teacher(parts, teacher_server, tmp_path, monkeypatch):
    for name, model in (("student", parts[0]), ("teacher", parts[1])):
        model.save_pretrained(tmp_path / name)
        parts[2].save_pretrained(tmp_path / name)
    argv = ["--model", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path)]
    argv += ["--teacher_server", teacher_server.address, "--teacher_mode", "teacher_topk", "--use_cpu", "true"]
    argv += ["--bf16", "false", "--report_to", "none", "--per_device_train_batch_size", "8", "--max_steps", "1"]
    splits = {"train": tests.Dataset.from_list(tests.image_rows(4)).add_column("id", list("abcd"))}
    loaded = train.build_trainer(*train.parse(argv), splits)
    assert loaded.teacher.local.trainer is loaded
    monkeypatch.setattr(train, "load_teacher", lambda *arguments: pytest.fail("loaded"))
    assert train.build_trainer(*train.parse([*argv, "--teacher_parity", "false"]), splits).teacher.local is None


# --- settings ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_mode": "topk"}, "teacher_mode must be one of exact, sampled_token, teacher_topk"),
        ({"teacher_mode": "sampled_token"}, "needs teacher_server"),
        ({"teacher_server": "http://node:8000"}, "teacher_mode='exact' needs the teacher in the trainer's process"),
        ({"teacher_server": "node:8000", "teacher_mode": "teacher_topk"}, "must start with http://"),
        ({"teacher_server": "http://n", "teacher_mode": "teacher_topk", "kl_temperature": 2.0}, "kl_temperature"),
        ({"teacher_top_k": 0}, "teacher_top_k must be at least 1"),
        ({"teacher_server_timeout": 0}, "teacher_server_timeout must be above 0"),
        ({"teacher_parity_limit": 0}, "teacher_parity_limit must be above 0"),
    ],
)
def test_bad_settings_are_one_clear_sentence(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        VAOPDConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_no_teacher_and_sharded_students_are_one_clear_sentence(make, parts, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="teacher_model is required"):
        tests.build(tmp_path, parts=(parts[0], None, parts[2]))
    monkeypatch.setattr("va_opd.checks.is_fsdp_enabled", lambda: True)
    with pytest.raises(ValueError, match="multi_gpu or zero2"):
        make()


def test_rows_that_pad_the_vocabulary_are_no_part_of_a_reply():
    reply = {"prompt_token_ids": [4, 7], "prompt_logprobs": [None, {
        "7": {"logprob": -2.0}, "12": {"logprob": -0.5}, "3": {"logprob": -1.0}, "2": {"logprob": -9999.0}
    }]}  # fmt: skip
    tokens, logps = served.read_scores(reply, [4, 7], 1, 4, vocab_size=10)
    assert tokens.tolist() == [[7, 3, 0, 0, 0]]
    assert logps.tolist() == [[-2.0, -1.0, -math.inf, -math.inf, -math.inf]]
