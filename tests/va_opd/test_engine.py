"""What stands before vLLM: folded image placeholders, kept log-probabilities, the gap to the student. No vLLM here."""

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from trl.generation.vllm_generation import VLLMGeneration

from va_opd.engine import VLLMRollouts, fold_placeholders

PAD = 9


def generation(mode: str, expanded: list[list[int]] | None = None) -> SimpleNamespace:
    """A recorder in place of vLLM, which makes `expanded` of the prompts and answers each with two tokens."""
    seen, shown = [], []

    def generate(prompts, images, num_generations, profiler=None):
        seen.append(prompts)
        shown.extend(images or [])
        rows = len(prompts)
        return expanded or prompts, [[5, 6]] * rows, [[[-1.0], [None]]] * rows, [[[5], [6]]] * rows

    tokens, model = SimpleNamespace(image_token_id=PAD), SimpleNamespace(deepstack_input_embeds=[torch.ones(2, 3)])
    rope, encoder = SimpleNamespace(positions=torch.ones(3, 5)), SimpleNamespace(inputs_embeds=torch.ones(2, 3))
    state = SimpleNamespace(rope_state=rope, encoder_runner=encoder)
    executor = SimpleNamespace(
        driver_worker=SimpleNamespace(model_runner=SimpleNamespace(model=model, model_state=state))
    )
    engine = SimpleNamespace(reset_encoder_cache=lambda: seen.append("reset"), model_executor=executor)
    reply = SimpleNamespace(raise_for_status=lambda: None)
    session = SimpleNamespace(post=lambda url: seen.append(url) or reply)
    return SimpleNamespace(
        generate=generate, logprobs=None, mode=mode, processing_class=tokens, seen=seen, shown=shown,
        sync_weights=lambda: seen.append("sync"), llm=SimpleNamespace(llm_engine=engine),
        accelerator=SimpleNamespace(is_main_process=True),
        vllm_client=SimpleNamespace(base_url="http://node:8000", session=session),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "reset"), [("colocate", "reset"), ("server", "http://node:8000/reset_encoder_cache")]
)
def test_images_are_encoded_anew_after_a_weight_sync(mode, reset):
    fake = generation(mode)
    VLLMRollouts(fake)
    fake.sync_weights()
    assert fake.seen == ["sync", reset]
    runner = fake.llm.llm_engine.model_executor.driver_worker.model_runner
    lost = [*runner.model.deepstack_input_embeds, runner.model_state.rope_state.positions]
    for tensor in (*lost, runner.model_state.encoder_runner.inputs_embeds):
        assert tensor.any() == (mode == "server")  # of a level of sleep that only the former has
    del runner.model.deepstack_input_embeds  # other families have none
    runner.model_state.rope_state = None  # nor M-RoPE
    fake.sync_weights()
    del runner.model_state  # of the runner for GPUs
    fake.sync_weights()
    fake.accelerator.is_main_process, fake.seen[:] = mode == "colocate", []
    fake.sync_weights()
    assert fake.seen == ["sync", "reset"][: 1 + (mode == "colocate")]  # the first process alone talks to a server


def test_the_parts_of_trl_that_are_used():
    parameters = list(inspect.signature(VLLMGeneration.generate).parameters)
    assert parameters == ["self", "prompts", "images", "num_generations", "profiler"]
    source = inspect.getsource(VLLMGeneration)
    assert {"self.logprobs = logprobs", "self.mode = mode"} <= {line.strip() for line in source.splitlines()}
    assert "llm_engine.model_executor.driver_worker.model_runner.model.load_weights" in source
    # As long as TRL hands expanded placeholders to a colocated engine, they must be folded here
    assert 'row = {"prompt_token_ids": ids}' in source


@pytest.mark.parametrize(("mode", "sent"), [("colocate", [1, PAD, 2, PAD, 3]), ("server", [1, PAD, PAD, 2, PAD, 3])])
def test_a_colocated_engine_gets_one_placeholder_an_image(mode, sent):
    prompt = [1, PAD, PAD, 2, PAD, 3]
    fake = generation(mode, [prompt])
    rollouts = VLLMRollouts(fake)
    result = fake.generate(prompts=[prompt], images=[["one", "two"]], num_generations=1, profiler=None)
    assert fake.seen == [[sent]]
    assert fake.logprobs == 0
    assert result[0] == [prompt]  # what is trained on keeps its placeholders
    assert result[1] == [[5, 6]]
    assert rollouts.logps == [[-1.0, None]]


@pytest.mark.parametrize("expanded", [[1, PAD, PAD, PAD, 2], [1, PAD, 8, 2]])
def test_another_prompt_of_a_colocated_engine_is_one_clear_sentence(expanded):
    fake = generation("colocate", [expanded])
    VLLMRollouts(fake)
    message = f"another prompt of text and images than the processor, of {len(expanded)} tokens where .* has 4:"
    with pytest.raises(ValueError, match=message) as error:
        fake.generate(prompts=[[1, PAD, PAD, 2]], images=[["one"]], num_generations=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_an_engine_gets_images_as_processors_see_them(mode):
    clear, turned = Image.new("RGBA", (2, 2), (10, 20, 30, 0)), Image.new("L", (4, 2), 7)
    turned.info["exif"] = b"turned"
    fake = generation(mode)
    VLLMRollouts(fake)
    fake.generate(prompts=[[1, PAD, 2, PAD], [1]], images=[[clear, turned], None], num_generations=1)
    (first, second), none = fake.shown
    assert none is None
    seen = np.asarray(convert_to_rgb(clear))  # transformers 5.17 drops alpha, 5.23 puts white behind it
    assert first.mode == "RGB" and np.array_equal(first, seen)
    assert (second.mode, second.size, second.info) == ("RGB", (4, 2), {})
    assert clear.mode == "RGBA" and turned.info  # the caller's stay


def test_text_passes_as_it_is():
    fake = generation("colocate")
    VLLMRollouts(fake)
    fake.generate(prompts=[[1, 2]], images=None, num_generations=1)
    assert fake.seen == [[[1, 2]]]
    assert fold_placeholders([1, 2], None, PAD) == [1, 2]


@pytest.mark.parametrize("ids", [[1, PAD, PAD], [PAD, 1, PAD, 2, PAD]])
def test_a_model_with_other_runs_is_refused(ids):
    with pytest.raises(ValueError, match="with 2 images has . runs of image placeholders"):
        fold_placeholders(ids, ["one", "two"], PAD)


def test_the_gap_leaves_out_the_nucleus():
    rollouts = VLLMRollouts(generation("server"))
    rollouts.logps = [[-1.0, -2.0, None], [-3.0], [-100.0]]
    student = torch.tensor([-1.0, -2.0, -7.0, -3.0])
    assert rollouts.gap(student, 2, top_p=1.0) == 0
    assert rollouts.gap(student + math.log(0.95), 2, top_p=0.95) == pytest.approx(0, abs=1e-6)
    assert rollouts.gap(student + math.log(0.95), 2, top_p=1.0) == pytest.approx(-math.log(0.95))
    assert rollouts.gap(student + 0.3, 2, top_p=0.95) == pytest.approx(0.3)  # never below the student's
    assert rollouts.gap(student - 0.3, 2, top_p=0.95) == pytest.approx(0.3 + math.log(0.95))
