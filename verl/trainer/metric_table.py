# SPDX-License-Identifier: Apache-2.0
"""Every metric that a run can log, in one table: what it means, when it is healthy, what to do when it is not.

`scripts/write_references.py` writes docs/en/metrics.md from it. Tests hold that every metric of a run has a row, and
that every row is met by some kind of run.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Metric:
    """One row: a metric, or several that are read together."""

    name: str
    """`{a,b}` stands for each of the words, and `<word>` for any text without spaces."""
    meaning: str
    """With the unit, where there is one."""
    healthy: str
    action: str
    """What to do outside the healthy range; empty where there is nothing to do."""
    needs_gpu: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What matches the names that the row stands for."""
        parts = re.split(r"(<[^>]+>|\{[^}]+\})", self.name)
        return re.compile("".join(map(_as_pattern, parts)))


def _as_pattern(part: str) -> str:
    if part.startswith("<"):
        return r"\S+"
    if part.startswith("{"):
        return "(?:" + "|".join(map(re.escape, part[1:-1].split(","))) + ")"
    return re.escape(part)


@dataclass(frozen=True)
class Area:
    """Metrics that belong together, under one heading."""

    title: str
    description: str
    metrics: tuple[Metric, ...]


AREAS = (
    Area(
        "Rewards and held-out results",
        "`<key>` is any key that the reward function returns; `overall` is the reward.",
        (
            Metric(
                "reward/overall",
                "mean reward of all responses of the step, including dropped groups",
                "rises over tens of steps",
                "Flat at its minimum or maximum: the task is too hard or too easy for this model, or the reward "
                "function is wrong. Read some responses in `generations.log`.",
            ),
            Metric(
                "reward/retried",
                "calls of the reward function that failed once and then gave a result",
                "0",
                "Read the warning, which names the failure; raise `worker.reward.timeout_s` for a slow judge.",
            ),
            Metric(
                "reward/<key>",
                "mean of that value of the reward function",
                "depends on the key",
                "`overall` rises and `accuracy` does not: the policy has found another way to the reward.",
            ),
            Metric(
                "val/reward_score",
                "mean reward of the held-out responses",
                "follows `reward/overall`",
                "It falls while the training reward rises: overfitting, or a reward that can be cheated. Stop at the "
                "best checkpoint.",
            ),
            Metric(
                "val/<key>_reward",
                "mean of a value of the reward function over the held-out responses; `val/accuracy_reward` where the "
                "function returns `accuracy`",
                "as for training",
                "",
            ),
        ),
    ),
    Area(
        "Lengths",
        "In tokens. `val_` marks the held-out responses.",
        (
            Metric(
                "{response_length,val_response_length}/{mean,max,min}",
                "length of the responses",
                "steady, or grows slowly",
                "It runs away or collapses to a few tokens: lower the learning rate, raise the KL coefficient, or let "
                "the reward check the form.",
            ),
            Metric(
                "{response_length,val_response_length}/clip_ratio",
                "share of the responses that fill `data.max_response_length`",
                "below 0.1",
                "Raise `data.max_response_length`; cut responses rarely earn a reward.",
            ),
            Metric(
                "{prompt_length,val_prompt_length}/{mean,max,min}", "length of the prompts, images included", "", ""
            ),
            Metric(
                "{prompt_length,val_prompt_length}/clip_ratio",
                "share of the prompts that fill `data.max_prompt_length`",
                "",
                "",
            ),
        ),
    ),
    Area(
        "Policy",
        "Means over the response tokens of a mini-batch, averaged over the step's optimizer steps. They are absent "
        "before `trainer.critic_warmup`. A loss of your own adds the metrics that it returns, as `actor/<name>`.",
        (
            Metric(
                "actor/pg_loss",
                "the policy loss that was trained on, weights included",
                "near 0, of either sign",
                "Its value says little: watch the reward.",
            ),
            Metric(
                "actor/ppo_kl",
                "mean of old minus new log-probability, in nats; it estimates the KL from the policy before the "
                "update",
                "within 0.02 of 0",
                "Lower `worker.actor.optim.lr`, or update less often on one batch (`ppo_epochs`, "
                "`worker.actor.global_batch_size`).",
            ),
            Metric(
                "actor/pg_clipfrac_{higher,lower}",
                "share of the tokens whose loss is clipped: by the range of the ratio, or by `clip_ratio_dual`",
                "below 0.1; 0 with one optimizer step per batch",
                "Lower the learning rate.",
            ),
            Metric(
                "actor/entropy_loss",
                "entropy of the distribution that tokens are sampled from, in nats; it is logged and not trained on",
                "falls slowly and stays above 0",
                "It falls to 0 within a few steps: the policy has collapsed. Lower the learning rate, raise "
                "`clip_ratio_high`, or go on from an earlier checkpoint. "
                "It rises without end: raise `algorithm.kl_coef`.",
            ),
            Metric(
                "actor/kl_loss",
                "KL from the reference policy as the loss has it, weights included",
                "grows slowly",
                "It jumps: lower the learning rate, or raise `algorithm.kl_coef`.",
            ),
            Metric("actor/kl_penalty", "mean KL that is taken off the rewards", "grows slowly", "As `actor/kl_loss`."),
            Metric(
                "actor/kl_coef",
                "coefficient of the KL",
                "constant, or moves with `algorithm.kl_type=adaptive`",
                "",
            ),
            Metric(
                "actor/grad_norm",
                "norm of the gradient, before clipping",
                "steady, mostly below a few times `worker.actor.max_grad_norm`",
                "Single peaks are clipped. Where it grows for many steps, lower the learning rate.",
            ),
            Metric("actor/lr", "learning rate", "as scheduled", ""),
            Metric(
                "{actor,critic}/skipped_steps",
                "optimizer steps that were left out because a gradient was not finite",
                "0",
                "Look at the rows in `skipped_samples.jsonl`; after `trainer.max_skipped_steps` such steps in a row "
                "the run ends.",
            ),
            Metric(
                "actor/uninformative_steps",
                "steps in a row, this one included, in which every advantage was 0",
                "0",
                "Rewards do not differ within a group: choose prompts of fitting difficulty, raise "
                "`worker.rollout.n`, or set `algorithm.online_filtering=true`.",
            ),
        ),
    ),
    Area(
        "Scores and advantages",
        "The area is called `critic` also where no critic is trained, as in EasyR1.",
        (
            Metric("critic/score/{mean,max,min}", "score of a response, from the reward function", "", ""),
            Metric(
                "critic/rewards/{mean,max,min}",
                "score minus the KL penalty, where the KL is part of the reward",
                "rises",
                "It stays while the score rises: the KL takes off what is gained. Lower `algorithm.kl_coef`.",
            ),
            Metric(
                "critic/advantages/{mean,max,min}",
                "advantage of a response token",
                "a mean near 0; both signs",
                "All 0: see `actor/uninformative_steps`.",
            ),
            Metric("critic/returns/{mean,max,min}", "return of a response token", "", ""),
            Metric(
                "critic/values/{mean,max,min}",
                "what the critic expects at a response token",
                "follows the returns",
                "",
            ),
            Metric(
                "critic/vf_explained_var",
                "1 - var(returns - values) / var(returns): 1 for a perfect critic, 0 for one that knows the mean",
                "above 0, rising",
                "Below 0 for many steps: raise `trainer.critic_warmup` or the critic's learning rate.",
            ),
            Metric("critic/vf_loss", "the clipped squared error that the critic was trained on", "falls", ""),
            Metric(
                "critic/vf_clipfrac",
                "share of the tokens whose value loss is clipped",
                "below 0.2",
                "Lower the critic's learning rate, or raise `worker.critic.cliprange_value`.",
            ),
            Metric("critic/vpred_mean", "mean of the critic's new values", "follows the returns", ""),
            Metric("critic/{grad_norm,lr}", "as for the policy", "as for the policy", ""),
        ),
    ),
    Area(
        "Token weights",
        "In runs with `algorithm.enable_token_weights=true`; over the response tokens of the step.",
        (
            Metric(
                "token_weights/mean",
                "mean weight",
                "0.8 to 1.1",
                "Outside, the update has another size than without weights: set "
                "`algorithm.token_weight_conserve_mean=true`, or widen `token_weight_clip`.",
            ),
            Metric(
                "token_weights/{std,min,max}",
                "spread of the weights",
                "`std` of 0.2 to 0.8",
                "0: nothing is weighted; see `weighted_rows`.",
            ),
            Metric(
                "token_weights/clipped_{low,high}",
                "shares of the tokens at or beyond the bounds of `token_weight_clip`",
                "below 0.3 each",
                "Widen the bounds, smooth the weights (`token_weight_smooth_sigma`), or use more layers.",
            ),
            Metric(
                "token_weights/ess",
                "effective sample size as a share of the tokens, (sum w)^2 / (n sum w^2): 1 if all weights are equal, "
                "0.5 where the loss is as noisy as with half of the tokens",
                "above 0.5",
                "Narrow `token_weight_clip`.",
            ),
            Metric(
                "token_weights/weighted_rows",
                "share of the responses in which any token's weight is not 1",
                "the share of rows with an image",
                "0: set `worker.rollout.collect_attentions=true`, or let the reward function return "
                "`token_weights`; rows without an image always have weight 1.",
            ),
            Metric(
                "token_weights/from_reward",
                "share of the responses whose weights the reward function gave",
                "0, or what your function returns",
                "",
            ),
            Metric("token_weights/top10_share", "share of all weight on the heaviest tenth of the tokens", "", ""),
            Metric(
                "token_weights/{digit,word,markup}_{share,tokens}",
                "share of all weight on tokens with digits, on words, on punctuation and markup; and their share of "
                "the tokens",
                "",
                "Compare the two: a `share` above its `tokens` is a kind that the weights favour.",
            ),
            Metric(
                "token_weights/cancelled_share",
                "share of the weighted advantages that cancels, because responses of a group begin with the same "
                "tokens",
                "below 0.5",
                "Large on short, templated answers, where weights change little.",
            ),
        ),
    ),
    Area(
        "Attention and signals",
        "`vgr/*` and `attention/*` need `worker.rollout.collect_attentions=true`, `signals/*` "
        "`algorithm.token_signals_to_log`.",
        (
            Metric(
                "vgr/{mean,median,p10,p90}",
                "VGR of the response tokens: attention per text token over attention per image token",
                "`p90` well above `p10`",
                "Equal percentiles tell no tokens apart: choose other layers with `scripts/inspect_attention.py`.",
            ),
            Metric(
                "attention/{text_mass,vision_mass}",
                "share of a token's attention to the prompt that falls on the text, or on the images",
                "`vision_mass` does not fall to 0",
                "It falls during training: the policy stops looking. Compare the accuracy with blank images.",
            ),
            Metric(
                "attention/aei_{text,vision}",
                "a modality's share of the attention over its share of the tokens",
                "1 is attention by size alone",
                "",
            ),
            Metric(
                "signals/spearman/<a>_<b>",
                "rank correlation of two signals over the tokens of a response, averaged over responses",
                "-1 to 1",
                "Near 1: the signals rank the tokens alike; one of them is enough.",
            ),
            Metric(
                "signals/<name>/{mean,std,p10,p90}", "importance that a signal gives to the response tokens", "", ""
            ),
        ),
    ),
    Area(
        "Rollout",
        "`filter/*` in runs with `algorithm.online_filtering=true`.",
        (
            Metric(
                "rollout/log_prob_diff_mean",
                "distance of the engine's and the trainer's log-probabilities of the drawn tokens, in nats",
                "below 1e-4 in fp32, below 0.02 in bf16",
                "Set `worker.rollout.importance_cap=2.0`, the same precision on both sides, `top_p=1` and `top_k=-1`.",
            ),
            Metric("rollout/log_prob_diff_max", "the largest such distance", "below 1 in bf16", "As for the mean."),
            Metric(
                "rollout/importance_{weight_mean,capped}",
                "mean of the importance weights, and the share of tokens at `worker.rollout.importance_cap`",
                "near 1; near 0",
                "As for `rollout/log_prob_diff_mean`.",
            ),
            Metric(
                "filter/draws",
                "batches of prompts drawn for the step",
                "1 to 3",
                "Near `trainer.max_try_make_batch`: widen `filter_low` and `filter_high`, or use other prompts.",
            ),
            Metric(
                "filter/kept_share", "share of the drawn groups that were kept", "above 0.3", "As for `filter/draws`."
            ),
        ),
    ),
    Area(
        "Time and hardware",
        "Phases are `gen` (rollout), `reward` (the wait that nothing hid), `old`, `ref`, `values`, `adv`, "
        "`update_critic`, `update_actor`, `validation`, `save_checkpoint` and `step`.",
        (
            Metric(
                "timing_s/<phase>",
                "seconds of a phase",
                "steady; `reward` near 0",
                "`reward` is long: see `worker.reward.max_concurrency`, and process pools in the function.",
            ),
            Metric(
                "timing_per_token_ms/<phase>",
                "milliseconds per token of a phase: response tokens for `gen` and `reward`, all tokens for the others",
                "steady",
                "",
            ),
            Metric("perf/total_num_tokens", "tokens of the step, prompts and responses", "", ""),
            Metric("perf/time_per_step", "seconds of the step", "steady", ""),
            Metric("perf/throughput", "tokens per second and device", "steady", ""),
            Metric(
                "perf/tflops_{actor,critic}",
                "operations of the update per second and device, in 10^12",
                "steady",
                "",
            ),
            Metric(
                "perf/mfu_{actor,critic}",
                "the same as a share of the device's peak, for devices whose peak is known",
                "0.3 to 0.6 for large models",
                "Raise the micro-batch, keep `padding_free` and `dynamic_batching` on.",
                needs_gpu=True,
            ),
            Metric(
                "perf/max_memory_{allocated,reserved}_gb",
                "largest GPU memory of a worker so far, in GiB",
                "below the device's memory",
                "Lower the micro-batch sizes, or offload (`worker.actor.offload.*`).",
                needs_gpu=True,
            ),
            Metric("perf/cpu_memory_used_gb", "memory in use on the fullest machine, in GiB", "steady", ""),
            Metric(
                "perf/reward_memory_gb",
                "memory of the reward function's process and its children, in GiB",
                "steady",
                "It grows: the function leaks. A warning tells at each doubling.",
            ),
            Metric(
                "global_seqlen/{min,max,minmax_diff,mean}",
                "tokens of a worker's rows before balancing",
                "",
                "",
            ),
            Metric(
                "global_seqlen/balanced_{min,max}",
                "tokens of a worker's rows after balancing",
                "close together",
                "Far apart with few, very long responses: more rows per worker even it out.",
            ),
        ),
    ),
)


def all_metrics() -> Iterator[Metric]:
    """The rows of all areas, in their order."""
    for area in AREAS:
        yield from area.metrics


def metric_of(name: str) -> Metric | None:
    """The first row that stands for a metric; None where there is none."""
    return next((metric for metric in all_metrics() if metric.pattern.fullmatch(name)), None)
