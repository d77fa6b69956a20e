"""Transformer-VQ (Lingle, ICLR 2024, https://arxiv.org/abs/2309.16354) in PyTorch, for `transformers`.

This scores texts and continues them; tvq, which wrote this file, trains. Attention is dense softmax attention
over quantised keys. A query attends exactly to its window, the M tokens before its block and the block up to
itself, and to everything before the window through one count and one mean value per code. What is kept of the
tokens read has a constant size: `State`.

A tensor's name carries its shape:

    B sequences   T tokens of the call   R blocks of L tokens   J block borders, R + 1   W window, M + L
    D model width   H heads   K key width   V value width   S codes   M memory length
    E distances, M + 1   N gated units   X any other
"""

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, silu
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .configuration_tvq import TvqConfig

END = 1  # the id that begins a document
UNSEEN = -1e30  # the score of what may not be attended to
AT_ONCE = 16  # blocks, at most, that are computed in parallel


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


class Norm(nn.Module):
    def __init__(self, *shape: int):
        super().__init__()
        self.gain, self.bias = weight(*shape), weight(*shape)


class Units(nn.Module):
    """The parameters of all gated units, stacked."""

    def __init__(self, m: SimpleNamespace):
        super().__init__()
        N, D, HK, HV = 2 * m.n_layer, m.d_model, m.n_head * m.d_k, m.n_head * m.d_v
        self.norm = Norm(N, D)
        self.q, self.k, self.r = weight(N, D, HK), weight(N, D, HK), weight(N, D, HK)
        self.v, self.g, self.out = weight(N, D, HV), weight(N, D, HV), weight(N, HV, D)
        self.u, self.w = weight(N, HK), weight(N, HK)


class Parameters(nn.Module):
    def __init__(self, m: SimpleNamespace):
        super().__init__()
        C, D = m.n_vocab, m.d_model
        self.units, self.embed = Units(m), nn.Module()
        self.embed.table = weight(C, D)
        if m.pe_abs:
            self.position = nn.Module()
            self.position.scale = weight()
        if m.e_preln:
            self.out_norm = Norm(D)
        if m.e_tie:
            self.embed.bias = weight(C)
        else:
            self.out = nn.Module()
            self.out.kernel, self.out.bias = weight(D, C), weight(C)


class Codebooks(nn.Module):
    """Moving averages of the keys that chose a code, and of their number."""

    def __init__(self, m: SimpleNamespace):
        super().__init__()
        N, H, S, K = 2 * m.n_layer, m.n_head, m.n_code, m.d_k
        self.sum = nn.Parameter(torch.empty(N, H, S, K), requires_grad=False)
        self.count = nn.Parameter(torch.empty(N, H, S), requires_grad=False)
        if m.revive_codes:  # updates since a key chose the code: of training alone, kept for it
            self.register_buffer("idle", torch.zeros(N, H, S, dtype=torch.int32))


class UnitState(NamedTuple):
    """Codes and values of the last M tokens; counts and sums of values of the codes before them.

    Code S marks an empty slot. `lost` is what rounding took from the sums.
    """

    z_BHM: Tensor
    v_BHMV: Tensor
    count_BHS: Tensor
    sum_BHSV: Tensor
    lost_BHSV: Tensor


class State:
    """All that is kept of the tokens read, in constant size. It changes in place as tokens are read.

    A document is identified by its start, the position of its first token; `start_BE` are those of the
    documents of the last M + 1 tokens. Codewords and position keys are made once, not at every token.
    """

    def __init__(self, model: "TvqForCausalLM", n_sequence: int):
        m, p = model.m, model.params.units
        self.m, self.narrow, self.device, self.n_sequence = m, model.narrow, p.q.device, n_sequence
        self.c_NHSK = model.codebooks.sum / model.codebooks.count.clamp(min=0.01)[..., None]
        distance_ED = sinusoid(torch.arange(m.mem_len + 1, device=self.device), m, wider(model.narrow))
        r_NEX = distance_ED @ p.r.to(distance_ED.dtype)
        self.r_NHEK = (heads(r_NEX, m) * m.d_k**-0.25).to(model.narrow)
        self.reset()

    def reset(self) -> None:
        """Back to before the first token."""
        self.position = 0
        B, E, device = self.n_sequence, self.m.mem_len + 1, self.device
        self.start_BE = torch.zeros(B, E, dtype=torch.long, device=device)
        # Whether text has begun, and whether padding has followed it.
        self.begun_B1 = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.ended_B1 = torch.zeros_like(self.begun_B1)
        self.units = [empty(self.m, B, device, self.narrow) for _ in range(2 * self.m.n_layer)]

    def reorder_cache(self, index_B: Tensor) -> None:
        """The sequences `index_B`, in place of those that it had."""
        index_B = index_B.to(self.device)
        self.n_sequence = len(index_B)
        self.start_BE, self.begun_B1, self.ended_B1 = (
            x[index_B] for x in (self.start_BE, self.begun_B1, self.ended_B1)
        )
        self.units = [UnitState(*(x[index_B] for x in unit)) for unit in self.units]

    def fork(self, n: int = 1) -> "State":
        """A state of its own with each sequence n times, side by side."""
        other = object.__new__(State)
        other.__dict__.update(self.__dict__)
        other.reorder_cache(torch.arange(self.n_sequence).repeat_interleave(n))
        return other


def empty(m: SimpleNamespace, n_sequence: int, device: torch.device, narrow: torch.dtype) -> UnitState:
    B, H, M, S, V = n_sequence, m.n_head, m.mem_len, m.n_code, m.d_v
    zeros = lambda *shape: torch.zeros(B, H, *shape, dtype=wider(narrow), device=device)
    z_BHM = torch.full((B, H, M), S, device=device)
    return UnitState(z_BHM, zeros(M, V).to(narrow), zeros(S), zeros(S, V), zeros(S, V))


@dataclasses.dataclass
class TvqOutput(ModelOutput):
    """`logits` are log-probabilities but for their normaliser; `state` is that after the tokens."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None


def wider(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def heads(x: Tensor, m: SimpleNamespace) -> Tensor:
    """`[...,T,HX]` to `[...,H,T,X]`."""
    return x.unflatten(-1, (m.n_head, -1)).transpose(-3, -2)


def sinusoid(position: Tensor, m: SimpleNamespace, dtype: torch.dtype) -> Tensor:
    """Sines, then cosines, of each position at D/2 wavelengths."""
    exponent = torch.arange(0, m.d_model, 2, dtype=dtype, device=position.device) / m.d_model
    angle = position.to(dtype)[..., None] * m.pe_lam**-exponent
    return torch.cat([angle.sin(), angle.cos()], -1)


def rms_norm(x: Tensor) -> Tensor:
    x = x.to(wider(x.dtype))
    return x * torch.rsqrt(1e-6 + (x**2).mean(-1, keepdim=True))


def norm(x: Tensor, gain_D: Tensor, bias_D: Tensor) -> Tensor:
    return (rms_norm(x) * gain_D + bias_D).to(x.dtype)


class TvqForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TvqConfig
    _is_stateful = True  # tokens that were read cannot be taken back
    # Parameters keep their dtype, whatever `dtype` a user asks for; activations have that of the config.
    _keep_in_fp32_modules: ClassVar = ["params", "codebooks"]
    _keep_in_fp32_modules_strict: ClassVar = _keep_in_fp32_modules

    def __init__(self, config: TvqConfig):
        super().__init__(config)
        self.m = SimpleNamespace(**config.tvq["model"])
        if self.m.attention != "vq":
            raise ValueError(f"the model's attention is {self.m.attention}; this file has vq alone")
        self.narrow = getattr(torch, self.m.dtype)
        self.params, self.codebooks = Parameters(self.m), Codebooks(self.m)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """All weights come from the file."""

    def forward(
        self,
        input_ids: Tensor,
        state: State | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> TvqOutput | tuple:
        """Reads tokens after those of the state, which changes in place; without one, from the beginning.

        The attention mask is 0 for padding, on the left, or on the right if nothing follows. It covers
        these tokens, and may cover those before them. Labels are the tokens themselves, or -100.
        """
        if self.training:
            raise RuntimeError("this model is for inference, call .eval(); tvq continues the training")
        B, T = input_ids.shape
        state = State(self, B) if state is None else state
        if state.n_sequence != B:
            raise ValueError(f"the state is of {state.n_sequence} sequences, input_ids of {B}: State.fork")
        seen_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -T:].long()
        check_padding(seen_BT, state)
        hidden, first = [], 0
        for length, n_token in cut(T, self.m.block_len):
            piece = slice(first, first + n_token)
            hidden.append(self.read(input_ids[:, piece], seen_BT[:, piece], length, state))
            first += n_token
        logits = self.logits(torch.cat(hidden, 1)[:, -logits_to_keep:])
        score = lambda: cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        output = TvqOutput(
            loss=None if labels is None else score(), logits=logits, state=state if use_cache else None
        )
        return output if return_dict else output.to_tuple()

    def read(self, token_BT: Tensor, seen_BT: Tensor, block_len: int, state: State) -> Tensor:
        """The last hidden `[B,T,D]` of whole blocks."""
        m, T = self.m, token_BT.shape[1]
        position_T = state.position + torch.arange(T, device=token_BT.device)
        begins_BT = (token_BT == END) & (not m.attend_across_documents)
        begun_BT = torch.where(begins_BT, position_T, 0)
        begun_BT = torch.where(seen_BT > 0, begun_BT, position_T + 1)  # the first token may come next
        start_BX = torch.cat([state.start_BE, begun_BT], 1).cummax(1).values
        x_BTD = self.params.embed.table[token_BT].to(self.narrow)
        if m.pe_abs:
            sinusoid_BTD = sinusoid(position_T - start_BX[:, -T:], m, wider(self.narrow))
            x_BTD = x_BTD + (self.params.position.scale * sinusoid_BTD).to(self.narrow)
        for n in range(2 * m.n_layer):
            x_BTD = x_BTD + self.unit(n, x_BTD, seen_BT, start_BX, block_len, state)
        state.position, state.start_BE = state.position + T, start_BX[:, T:].clone()
        return x_BTD

    def unit(
        self, n: int, x_BTD: Tensor, seen_BT: Tensor, start_BX: Tensor, block_len: int, state: State
    ) -> Tensor:
        """The output `[B,T,D]` of gated unit n (paper section 3.4), without the residual."""
        m, p, scale = self.m, self.params.units, self.m.d_k**-0.25
        xt_BTD = norm(x_BTD, p.norm.gain[n], p.norm.bias[n])
        dense = lambda kernel_NDX: xt_BTD @ kernel_NDX[n].to(xt_BTD.dtype)
        q_BHTK, k_BHTK = (rms_norm(heads(dense(kernel), m)) * scale for kernel in (p.q, p.k))
        v_BHTV, gate_BTX = heads(silu(dense(p.v)), m), silu(dense(p.g))
        u_H1K, w_H1K = (bias_NX[n].unflatten(0, (m.n_head, 1, -1)) * scale for bias_NX in (p.u, p.w))
        # Each key becomes the nearest codeword (section 3.2). |k - c|^2 less |k|^2, halved and negated.
        c_HSK = state.c_NHSK[n]
        nearness_BHTS = k_BHTK @ c_HSK.mT - 0.5 * (c_HSK**2).sum(-1)[:, None]
        z_BHT = nearness_BHTS.argmax(-1).masked_fill(seen_BT[:, None] == 0, m.n_code)
        product = lambda a, b: (a.to(self.narrow) @ b.to(self.narrow).mT).to(wider(self.narrow))
        # A key's content score is that of its code; its position score depends on its distance.
        content_BHTS = product(q_BHTK + u_H1K, c_HSK)
        near_BHTE = product(q_BHTK + w_H1K, state.r_NHEK[n])
        o_BHTV, state.units[n] = attend(
            content_BHTS, near_BHTE, z_BHT, v_BHTV, start_BX, state.units[n], block_len, m.agg_cache
        )
        return (o_BHTV.transpose(1, 2).flatten(2) * gate_BTX) @ p.out[n].to(gate_BTX.dtype)

    def logits(self, x_BTD: Tensor) -> Tensor:
        m, p = self.m, self.params
        if m.e_preln:
            x_BTD = norm(x_BTD, p.out_norm.gain, p.out_norm.bias)
        kernel_DC, bias_C = (p.embed.table.T, p.embed.bias) if m.e_tie else (p.out.kernel, p.out.bias)
        x_BTD = x_BTD.to(wider(x_BTD.dtype))
        return (x_BTD @ kernel_DC.to(x_BTD.dtype) + bias_C) * m.e_scale

    # What `generate` asks for. The cache is called `state`, a name that is the same in all releases.

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self, input_ids, state=None, attention_mask=None, use_cache=True, is_continued=False, **_
    ):
        """A state that the user gives is of the tokens before `input_ids`, and stays as it is."""
        if state is not None and not is_continued:
            state = state.fork(max(1, len(input_ids) // state.n_sequence))
        given = {
            "state": state,
            "attention_mask": attention_mask,
            "logits_to_keep": 1,
            "use_cache": use_cache,
        }
        return given | {"input_ids": input_ids[:, -1:] if is_continued else input_ids}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **options):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **options)
        continued = {"state": outputs.state, "is_continued": True}
        return model_kwargs | (continued if model_kwargs.get("use_cache", True) else {})


def cut(n_token: int, block_len: int) -> Iterator[tuple[int, int]]:
    """Block length and number of tokens of each piece: whole blocks, some in parallel, then the rest as one.

    What a query attends to does not depend on where blocks end: beyond M tokens a key of the window has the
    score of its code in the cache.
    """
    while n_token > 0:
        n_block = min(n_token // block_len, AT_ONCE)
        piece = (block_len, n_block * block_len) if n_block else (n_token, n_token)
        yield piece
        n_token -= piece[1]


def check_padding(seen_BT: Tensor, state: State) -> None:
    """ValueError: text follows padding that follows text, so that distances in it would be wrong."""
    begun_BX = torch.cat([state.begun_B1, seen_BT], 1).cummax(1).values
    ended_BX = torch.cat([state.ended_B1, (begun_BX[:, 1:] > seen_BT).to(torch.long)], 1).cummax(1).values
    if (ended_BX[:, 1:] * seen_BT).any():
        raise ValueError("there is padding within a text; pad on the left: tokenizer.padding_side = 'left'")
    state.begun_B1, state.ended_B1 = begun_BX[:, -1:].clone(), ended_BX[:, -1:].clone()


def attend(
    content_BHTS: Tensor,
    near_BHTE: Tensor,
    z_BHT: Tensor,
    v_BHTV: Tensor,
    start_BX: Tensor,
    before: UnitState,
    block_len: int,
    agg_cache: bool,
) -> tuple[Tensor, UnitState]:
    """Output `[B,H,T,V]`, and the state after the tokens (paper section 3.3, all blocks in parallel).

    `start_BX` are the starts of the documents of the M + 1 tokens before, and of the T tokens.
    """
    (B, H, T, S), M, L = content_BHTS.shape, before.z_BHM.shape[2], block_len
    W, R, device = M + L, T // L, z_BHT.device
    z_BHX, v_BHXV = torch.cat([before.z_BHM, z_BHT], 2), torch.cat([before.v_BHMV, v_BHTV], 2)
    blocks = lambda x: x.unflatten(2, (R, L))

    # The window: column j lies M + i - j tokens before query i of the block.
    z_BHR1W = z_BHX.unfold(2, W, L)[:, :, :, None]
    distance_LW = M + torch.arange(L, device=device)[:, None] - torch.arange(W, device=device)
    is_far_LW = distance_LW > M
    everywhere = lambda x: x.expand(B, H, R, L, W)
    near_BHRLW = blocks(near_BHTE).gather(4, everywhere(distance_LW.clamp(0, M))).masked_fill(is_far_LW, 0)
    score_BHRLW = blocks(content_BHTS).gather(4, everywhere(z_BHR1W.clamp(max=S - 1))) + near_BHRLW
    query_B1RL1 = start_BX[:, None, M + 1 :, None].unflatten(2, (R, L))
    is_unseen = query_B1RL1 != start_BX[:, 1:].unfold(1, W, L)[:, None, :, None]
    is_unseen = is_unseen | (distance_LW < 0) | (z_BHR1W == S) | (is_far_LW & (not agg_cache))
    scores = [score_BHRLW.masked_fill(is_unseen, UNSEEN)]
    values = [v_BHXV.unfold(2, W, L).mT]

    # The cache (section 3.4): a code stands for as many keys as have left the window.
    border_BJ = start_BX[:, : T + 1 : L]  # the document that the cache holds: of the last token to leave
    count_BHJS, sum_BHJSV, after = cache(z_BHX, v_BHXV, start_BX, border_BJ, before, L)
    if agg_cache:
        counted_BHR1S = count_BHJS[:, :, :R, None].log().clamp(min=UNSEEN)
        score_BHRLS = blocks(content_BHTS) + counted_BHR1S
        scores.append(score_BHRLS.masked_fill(query_B1RL1 != border_BJ[:, None, :R, None, None], UNSEEN))
        values.append(sum_BHJSV[:, :, :R] / count_BHJS[:, :, :R, :, None].clamp(min=1))

    p_BHRLX = torch.cat(scores, -1).softmax(-1).to(v_BHTV.dtype)
    o_BHRLV = p_BHRLX @ torch.cat([value.to(v_BHTV.dtype) for value in values], 3)
    return o_BHRLV.flatten(2, 3), after


def cache(
    z_BHX: Tensor, v_BHXV: Tensor, start_BX: Tensor, border_BJ: Tensor, before: UnitState, block_len: int
) -> tuple[Tensor, Tensor, UnitState]:
    """Counts and sums of values of each code before each block and after the last, and the next state.

    They cover the document of the last token that left the window; those before it have no query left.
    """
    S, R = before.count_BHS.shape[2], border_BJ.shape[1] - 1
    T, wide = R * block_len, before.sum_BHSV.dtype
    start_B1RL = start_BX[:, None, 1 : T + 1].unflatten(2, (R, block_len))
    z_BHRL = z_BHX[:, :, :T].unflatten(2, (R, block_len))
    z_BHRL = torch.where(start_B1RL == border_BJ[:, None, 1:, None], z_BHRL, S)
    hit_BHRLS = one_hot(z_BHRL, S + 1)[..., :S].to(wide)
    added_BHRSV = hit_BHRLS.mT @ v_BHXV[:, :, :T].unflatten(2, (R, block_len)).to(wide)
    # What has left since, block by block, of the document that is in the cache at each border.
    same_BJR = (border_BJ[:, :, None] == border_BJ[:, None, 1:]).tril(-1).to(wide)
    kept_B1J1 = (border_BJ == border_BJ[:, :1])[:, None, :, None].to(wide)
    more_BHJSV = torch.einsum("bjr,bhrsv->bhjsv", same_BJR, added_BHRSV)
    more_BHJS = torch.einsum("bjr,bhrs->bhjs", same_BJR, hit_BHRLS.sum(3))
    # Added with what rounding took before (Kahan 1965): small values would soon not change a large sum.
    count_BHJS = kept_B1J1 * before.count_BHS[:, :, None] + more_BHJS
    old_BHJSV = kept_B1J1[..., None] * before.sum_BHSV[:, :, None]
    more_BHJSV = more_BHJSV + kept_B1J1[..., None] * before.lost_BHSV[:, :, None]
    sum_BHJSV = old_BHJSV + more_BHJSV
    lost_BHSV = more_BHJSV[:, :, R] - (sum_BHJSV[:, :, R] - old_BHJSV[:, :, R])
    parts = (z_BHX[:, :, T:], v_BHXV[:, :, T:], count_BHJS[:, :, R], sum_BHJSV[:, :, R])
    # Clones: a view would keep all that it is a part of.
    return count_BHJS, sum_BHJSV, UnitState(*(part.clone() for part in parts), lost_BHSV)
