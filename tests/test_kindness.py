"""What people write by mistake is met with what to write instead; what they may well mean simply works.

In a process of its own, without the type checks that the other tests run under: a user has none.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SAID = {
    "Penalised(TReFT())": "TReFT has no weight here: write Penalised((Weighted(TReFT(...), 30.0),))",
    "Penalised((TReFT(),))": "TReFT has no weight here: write Penalised((Weighted(TReFT(...), 30.0),))",
    "lens.SteeringVector.zeros(576, 15)": "piggyback_lens has no SteeringVector any more: use Direction",
    'TrainSettings(steps="a")': "TrainSettings.steps is 'a'; expected a whole number",
    "SteerSettings(phase='sometimes')": "SteerSettings.phase is 'sometimes'; expected one of prompt, generation, both",
    "RetainData(examples[:3])": "batch_size is 8 and there are 3 retain examples; expected 1 to that many",
    'carrier_map(pair, ["Why?"])': "prompt 0 is str, expected a rendered prompt: ChatFormat(tokenizer).render(query)",
    "patch_span(pair, prompt)": "got RenderedPrompt where a list of rendered prompts belongs",
    'perturb(pair, ["Why?"], "words")': "prompt 0 is str, expected a rendered prompt",
    'stress(pair, ["Why?"], "words")': "prompt 0 is str, expected a rendered prompt",
    'steer(model, Direction.zeros(32, 1), ["Why?"], "words")': "prompt 0 is str, expected a rendered prompt",
    'mean_difference(model, ["a", "b"], ["c", "d"])': "prompt 0 is str, expected a rendered prompt",
    'train(peft, ["hi"], TrainSettings(steps=1, batch_size=1))': "prompt 0 is str, expected a rendered prompt",
    "ModelPair.load(peft)": "a PEFT model holds both sides: ModelPair.load(finetuned=peft_model, tokenizer=tokenizer)",
    "generate(pair, [prompt])": "a pair is two models: with pair.using('finetuned') as model: ...",
    "nll(pair, examples)": "a pair is two models: with pair.using('finetuned') as model: ...",
    "generate(peft, [prompt])": "wrap a transformers model with piggyback_lens.hook_model(model, tokenizer)",
    "train(Direction.zeros(32, 1), examples)": "train(HookTrainable(model, direction), ...)",
}
WORKS = {
    "Direction.zeros(576, 15).layers": [15],
    "len(Penalised(Weighted(TReFT(), 3.0)).parts)": 1,
    'GeneratedBehaviour("words").name': "words per answer",
    'LoRAAdapter.fresh(model, modules=["down_proj"]).modules': ["down"],
    'TrainDirectionSettings(kind="lora", modules=["q_proj", "down"]).modules': ["q", "down"],
    'add_lora(fresh(), LoRASettings(modules=("down",))) is not None': True,
    "SteerSettings(layers=3).layers": [3],
    'LoadSettings(dtype="bfloat16") == LoadSettings(dtype=torch.bfloat16)': True,
    "len(train(HookTrainable(model, Direction.zeros(32, 1)), examples, short).history)": 1,
}
SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, tiny_chat, tiny_hooked, tiny_models
import piggyback_lens as lens
from piggyback_lens import *

def fresh():
    return tiny_models.build("llama-gqa", 0, vocab=tiny_chat.VOCAB)

model, prompt = tiny_hooked.hooked("llama-gqa", "bridge"), tiny_chat.tiny_format().render("hello there")
peft = add_lora(fresh(), LoRASettings(rank=2))
pair = ModelPair.load(finetuned=peft, tokenizer=tiny_chat.tiny_tokenizer())
examples, short = tiny_chat.tiny_examples(4, seed=3), TrainSettings(steps=1, batch_size=2)
found = {}
for code in json.load(sys.stdin):
    try:
        found[code] = eval(code)
    except (LensError, AttributeError) as error:
        found[code] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def met():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([*SAID, *WORKS]),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("code", SAID)
def test_a_mistake_is_told_what_to_write_instead(met, code):
    assert SAID[code] in met[code]


@pytest.mark.parametrize("code", WORKS)
def test_what_is_meant_simply_works(met, code):
    assert met[code] == WORKS[code]
