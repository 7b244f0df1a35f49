"""Generation as ratios against named peers doing the same work in the same run.

    python benchmarks/foundation.py [--shape 8b --device cuda --dtype bfloat16] [--prompts 16] [--tokens 24]

Each comparison first asserts that both sides give the same numbers. Prints a Markdown table: seconds are
medians of `repeats` runs on this machine, only the ratios are meant to travel.
"""

import statistics
from collections import Counter

import torch
from setting import Setting, arguments_of

from piggyback_lens import (
    ChatFormat,
    ModelPair,
    PrefixCache,
    Sampling,
    add,
    batch_prompts,
    generate,
    hook_model,
    load_task,
    patch,
    prefix_activations,
)
from piggyback_lens.models.backends import blocks_of
from piggyback_lens.models.static import static_sizes
from piggyback_lens.models.views import merged_bytes


def off_topic(count):
    """So many prompts of a shipped task, which has fewer: they are used again with a number before them."""
    own = load_task("terse").off_topic
    return [own[i % len(own)] if i < len(own) else f"{i}. {own[i % len(own)]}" for i in range(count)]


def generation_rows(setting, n_prompts, new_tokens):
    """Unpatched and repaired generation against transformers' own, and against a hook-per-sample loop."""
    tokenizer = setting.tokenizer()
    tuned = setting.adapted().eval()
    plain = setting.adapted().eval() if setting.real else tuned  # random weights are not rewired by being loaded
    pair = ModelPair.load(finetuned=tuned, tokenizer=tokenizer)
    prompts = [pair.chat_format().render(q) for q in off_topic(n_prompts)]
    batch = batch_prompts(prompts, pad_id=tokenizer.pad_token_id, device=setting.device)
    limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    repair = PrefixCache.compile(pair, prompts[0], side="base")

    @torch.no_grad()
    def peer():
        return plain.generate(
            input_ids=batch.ids, attention_mask=batch.attention_mask, pad_token_id=tokenizer.pad_token_id, **limits
        )

    def ours(prefix_cache=None, **how):
        with pair.using("finetuned") as model:
            return generate(
                model, prompts, prefix_cache=prefix_cache, max_new_tokens=new_tokens, stop_ids=[],
                batch_size=n_prompts, **how,
            )  # fmt: skip

    def ids_of(answers):
        return [answer.ids for answer in answers]

    def hook_per_sample():
        one = patch(prefix_activations(pair, "base", prompts[0], ("k", "v")))
        with pair.using("finetuned") as model:
            return [
                generate(model, [p], interventions=one, max_new_tokens=new_tokens, stop_ids=[], share_prefix=False)[0]
                for p in prompts
            ]

    setting.assert_answers(ids_of(ours()), peer()[:, batch.ids.shape[1] :].tolist())
    setting.assert_answers(ids_of(ours(static_cache=True)), ids_of(ours(static_cache=False)))
    work = f"generation, {n_prompts} prompts, {new_tokens} tokens each"

    def compared(work, name, theirs, fast, target):
        a, b, ratio = setting.in_turns(theirs, fast)
        setting.add(work, name, a, b, ratio, ours_ms_per_token=1e3 * b / new_tokens, target=target)
        setting.explain(work, fast)

    compared(f"unpatched {work}", "transformers generate", peer, ours, ">= 1 on CPU, 8B on GPU <= 10 ms per token")
    compared(
        f"repaired {work}",
        "transformers generate, unpatched",
        peer,
        lambda: ours(repair),
        ">= 1.2, 8B on GPU <= 10 ms per token",
    )
    repaired_s = setting.rows[-1]["ours_s"]
    layer = len(blocks_of(plain)) // 2
    vector = torch.randn(plain.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(setting.device) / 4

    def steered_peer():
        def hook(_module, _inputs, output):
            moved = (output[0] if isinstance(output, tuple) else output) + vector.to(setting.dtype)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = blocks_of(plain)[layer].register_forward_hook(hook)
        try:
            return peer()
        finally:
            handle.remove()

    def steered():
        return ours(interventions=add(vector, layers=layer, span="all"))

    setting.assert_answers(ids_of(steered()), steered_peer()[:, batch.ids.shape[1] :].tolist())
    compared(f"steered {work}", "transformers generate, a hook on the block", steered_peer, steered, ">= 1")
    if setting.device == "cpu":
        looped = []
        loop_s = setting.seconds(lambda: looped.extend(hook_per_sample()))  # once: it is long enough
        setting.assert_answers(ids_of(ours(repair)), ids_of(looped))
        setting.add(f"repaired {work}", "hooks, one prompt at a time", loop_s, repaired_s)
    return pair, plain


SLIGHTLY = 0.002  # so that it still speaks
STOPPING = (
    "What is the capital of France? One word.", "Say hello.", "What is 2 + 2?", "Name a colour, nothing else.",
    "Is the sky blue? Answer yes or no.", "Thank you!", "Who wrote Hamlet? Just the name.", "Good night.",
    "Explain how bread is made.", "Write about the sea.", "Why do leaves fall in autumn?", "Tell me a story.",
    "Give me three tips for learning the piano.", "How does a bicycle stay upright?", "Describe a city at night.",
    "What should I cook for six guests?",
)  # fmt: skip


def stopping_rows(setting, tuned=None, rows=0):
    """Answers that end at very different lengths: what is finished must not cost.

    A finetuned model ends them by itself; one of random numbers (`tuned`) gives so many rows of them, and ends them
    with some of the tokens that it says.
    """
    tokenizer = setting.tokenizer()
    plain = tuned or setting.adapted(SLIGHTLY).eval()
    model = hook_model(tuned or setting.adapted(SLIGHTLY).eval(), tokenizer)
    chat = ChatFormat(tokenizer)
    prompts = [chat.render(text) for text in (off_topic(rows) if tuned else STOPPING)]
    batch = batch_prompts(prompts, pad_id=tokenizer.pad_token_id, device=setting.device)
    ends = sorted({*prompts[0].answer.stop_ids, tokenizer.eos_token_id})
    if tuned:
        ends = _said_late(generate(model, prompts, max_new_tokens=60, stop_ids=[], batch_size=len(prompts)))

    @torch.no_grad()
    def peer():
        return plain.generate(
            input_ids=batch.ids, attention_mask=batch.attention_mask, max_new_tokens=60, do_sample=False,
            eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip

    def ours():
        return generate(model, prompts, max_new_tokens=60, stop_ids=ends, batch_size=len(prompts))

    answers = [answer.ids for answer in ours()]
    theirs = [
        row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
        for row in peer()[:, batch.ids.shape[1] :].tolist()
    ]
    setting.assert_answers(answers, theirs)
    lengths = sorted(map(len, answers))
    work = f"generation, {len(prompts)} prompts, real stops ({lengths[0]} to {lengths[-1]} tokens, mean "
    work += f"{statistics.mean(lengths):.0f})"
    wasted = {
        "if rows stay": _wasted(lengths, [len(lengths)]),
        "in captured halves": _wasted(lengths, static_sizes(len(lengths))),
    }
    more = {f"row-steps after an answer's end, {how}": part for how, part in wasted.items()}
    setting.add(work, "transformers generate", *setting.in_turns(peer, ours), **more)


def _said_late(answers):
    """Stop tokens that end about half of the answers on their way."""
    first = Counter(token for answer in answers for token in dict.fromkeys(answer.ids[4:]))
    return [token for token, n in first.most_common() if n <= len(answers) / 4][:4]


def _wasted(lengths, sizes):
    """The part of row-steps that come after an answer's end, where steps have one of these numbers of rows."""
    alive = [sum(length > step for length in lengths) for step in range(max(lengths))]
    return 1 - sum(lengths) / sum(min(size for size in sizes if size >= rows) for rows in alive)


def sample_rows(setting, new_tokens, model=None):
    """Sixteen samples of one prompt in one call against sixteen calls, the same texts."""
    tokenizer = setting.tokenizer()
    model = hook_model(setting.model(), tokenizer) if model is None else model
    prompt, sampling = ChatFormat(tokenizer).render("Tell me a story."), Sampling(temperature=1.0, top_p=0.9)
    limits = {"max_new_tokens": new_tokens, "sampling": sampling, "stop_ids": []}

    def together():
        return generate(model, [prompt], n=16, **limits)

    def apart():
        return [generate(model, [prompt], samples=[number], **limits)[0] for number in range(16)]

    setting.assert_answers([answer.ids for answer in together()], [answer.ids for answer in apart()])
    setting.add("16 samples of a prompt", "16 calls of one", *setting.in_turns(apart, together, 1))
    evaluated(setting, model, limits)


def evaluated(setting, model, limits):
    """Samples of several questions as experiments ask for them, against transformers' own sampling of as many."""
    tokenizer, new_tokens = setting.tokenizer(), limits["max_new_tokens"]
    chat, plain = ChatFormat(tokenizer), setting.model().eval()
    questions = off_topic(4)
    prompts = chat.ask(questions)
    batch = batch_prompts(prompts, pad_id=tokenizer.pad_token_id, device=setting.device)

    def ours():
        return generate(model, chat.ask(questions, samples=16), batch_size=64, **limits)

    @torch.no_grad()
    def peer():
        return plain.generate(
            input_ids=batch.ids, attention_mask=batch.attention_mask, num_return_sequences=16, do_sample=True,
            temperature=1.0, top_p=0.9, top_k=0, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip

    one = [answer.ids for answer in generate(model, prompts, n=16, batch_size=64, **limits)]
    setting.assert_answers([answer.ids for answer in ours()], one)
    work = f"4 questions, 16 samples each, {new_tokens} tokens"
    setting.add(work, "transformers generate, num_return_sequences", *setting.in_turns(peer, ours, 3))


def main():
    parser = arguments_of(__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    parser.add_argument("--stopping", type=int, default=128, help="answers of random weights that end early")
    arguments = parser.parse_args()
    setting = Setting.of(arguments)
    setting.begin("generation")
    pair, plain = generation_rows(setting, arguments.prompts, arguments.tokens)
    setting.facts["merged_gb"] = merged_bytes(plain) / 1e9
    if setting.real:
        stopping_rows(setting)
        sample_rows(setting, arguments.tokens)
    else:
        stopping_rows(setting, plain, arguments.stopping)
        with pair.using("finetuned") as model:
            sample_rows(setting, arguments.tokens, model)
    setting.end()


if __name__ == "__main__":
    main()
