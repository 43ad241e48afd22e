"""Any order of calls on caches, and any order of merges, against what they stand for."""
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from support.backends import AVAILABLE, DEVICE

import tilewise as tw
from tilewise.state import AttentionState, merge_states

pytestmark = pytest.mark.usefixtures("one_thread")

DIM, DIM_V, SLOTS, CAPACITY, MOST_NEW = 8, 5, 4, 40, 17

OPTIONS = st.fixed_dictionaries({}, optional=dict(
    causal=st.just(True),
    mask=st.one_of(st.tuples(st.just("window"), st.none() | st.integers(0, 9), st.none() | st.integers(0, 9)),
                   st.tuples(st.just("function"), st.integers(2, 4), st.integers(0, 6))),
    score_mod=st.sets(st.sampled_from(["softcap", "alibi", "alibi of sequences", "function"]), max_size=2),
    sinks=st.just(True), num_splits=st.integers(1, 5), scale=st.sampled_from([0.0, 0.9, -0.4])))


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def made(options, sequences, heads, seed):
    """The keyword arguments of a call on so many sequences: of all of them, then of each alone."""
    sinks, slopes = normal(heads, seed=seed), normal(sequences, heads, seed=seed + 1)
    reaches = torch.arange(sequences, device=DEVICE)

    def of(own):
        result = {name: options[name] for name in ("causal", "scale") if name in options}
        if "sinks" in options:
            result["sinks"] = sinks
        if "mask" in options:
            kind, *sizes = options["mask"]
            result["mask"] = tw.window(*sizes) if kind == "window" else function(*sizes, reaches[own])
        mods = {"softcap": tw.softcap(1.5), "alibi": tw.alibi(slopes[0]), "alibi of sequences": tw.alibi(slopes[own]),
                "function": lambda s, b, h, q, k: s * (1 + (q + 2 * k) % 3) + 0.1 * h}
        result["score_mod"] = [mods[name] for name in sorted(options.get("score_mod", ()))]
        return result

    return of(slice(None)), [of(slice(b, b + 1)) for b in range(sequences)]


def function(step, reach, reaches):
    return lambda b, h, q, k: ((q - k) % step == h % 2) | (k > q - reach - reaches[b])


def last_rows(q, k, v, options):
    """Of queries [S_q, H, D] at the end of keys [n, H_kv, D]: the last rows of dense attention over the whole sequence."""
    whole = torch.cat([q.new_zeros(max(0, len(k) - len(q)), *q.shape[1:]), q])
    out, lse = tw.attention(*(x[None].double() for x in (whole, k, v)), **options, return_lse=True, backend="reference")
    first = len(whole) - len(q)
    return out[0, first:], lse[0, :, first:]


class Caches(RuleBasedStateMachine):
    """A paged cache and a contiguous one beside a dictionary of (keys, values). Unused memory holds NaN."""
    backend = ""

    @initialize(page_size=st.sampled_from([1, 3, 16]), heads=st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]),
                padding=st.lists(st.integers(0, 3), min_size=SLOTS, max_size=SLOTS),
                lengths=st.lists(st.sampled_from([0, 1, 7, 16, 21]), min_size=1, max_size=SLOTS))
    def create(self, page_size, heads, padding, lengths):
        self.kv_heads, self.heads = heads[0], heads[0] * heads[1]
        self.model, self.seed = {}, 0
        shape = dict(kv_heads=self.kv_heads, head_dim=DIM, head_dim_v=DIM_V, dtype=torch.float32, device=DEVICE)
        self.paged = tw.PagedKVCache(128 // page_size, page_size, max_sequences=SLOTS, **shape)
        padding = torch.tensor(padding, dtype=torch.int32, device=DEVICE)
        self.flat = tw.KVCache(SLOTS, CAPACITY + 3, left_padding=padding, **shape)
        for number, length in enumerate(lengths):
            self.new()
            self.model[number] = tuple(normal(length, self.kv_heads, dim, seed=number + dim) for dim in (DIM, DIM_V))
            new = [x[None] for x in self.model[number]]
            self.paged.append(*new, sequences=[number])
            self.flat.append(*new, cache_batch_idx=torch.tensor([number], device=DEVICE))

    @precondition(lambda self: len(self.model) < SLOTS)
    @rule()
    def new(self):
        self.model[self.paged.new()] = normal(0, self.kv_heads, DIM, seed=0), normal(0, self.kv_heads, DIM_V, seed=0)

    @precondition(lambda self: 0 < len(self.model) < SLOTS)
    @rule(data=st.data())
    def fork(self, data):
        parent = data.draw(st.sampled_from(sorted(self.model)))
        child = self.paged.fork(parent)
        self.model[child] = self.model[parent]
        self.flat.append(*(x[None] for x in self.model[parent]), cache_batch_idx=torch.tensor([child], device=DEVICE))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        self.paged.free(sequence)
        self.shorten(sequence, 0)
        del self.model[sequence]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data):
        sequence = data.draw(st.sampled_from(sorted(self.model)))
        length = data.draw(st.integers(0, len(self.model[sequence][0])))
        self.paged.truncate(sequence, length)
        self.shorten(sequence, length)

    def shorten(self, sequence, length):
        self.flat.truncate(*(torch.tensor([x], device=DEVICE) for x in (length, sequence)))
        self.model[sequence] = tuple(x[:length] for x in self.model[sequence])

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(0, MOST_NEW), queries=st.integers(0, MOST_NEW), options=OPTIONS)
    def attend(self, data, count, queries, options):
        """Every sequence gets `count` keys, 0 by no call to append."""
        sequences = self.pick(data)
        count = min([count, *(CAPACITY - len(self.model[s][0]) for s in sequences)])
        queries = min([queries, *(len(self.model[s][0]) + count or queries for s in sequences)])
        self.run(sequences, len(sequences) * [count], len(sequences) * [queries], options, packed=False)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), appending=st.booleans(), spare=st.integers(0, 2), options=OPTIONS)
    def attend_packed(self, data, appending, spare, options):
        """Mixed: some sequences get a prompt, some one token, some none. Spare rows belong to no sequence."""
        sequences = self.pick(data)
        sizes = st.sampled_from([0, 1, 1, 2, 5, MOST_NEW])
        wanted = data.draw(st.lists(sizes, min_size=len(sequences), max_size=len(sequences)))
        room = [CAPACITY - len(self.model[s][0]) if appending else len(self.model[s][0]) or n
                for s, n in zip(sequences, wanted, strict=True)]
        counts = [min(pair) for pair in zip(wanted, room, strict=True)]
        self.run(sequences, counts if appending else None, counts, options, packed=True, spare=spare)

    def pick(self, data):
        order = data.draw(st.permutations(sorted(self.model)))
        return order[:data.draw(st.sampled_from(range(len(order), 0, -1)))]

    def run(self, sequences, counts, queries, options, packed, spare=0):
        self.seed += 10
        total = 0 if counts is None else sum(counts)
        k, v = (normal(total + spare, self.kv_heads, dim, seed=self.seed + dim) for dim in (DIM, DIM_V))
        q = normal(sum(queries) + spare, self.heads, DIM, seed=self.seed)
        of_all, of_each = made(options, len(sequences), self.heads, self.seed + 1)
        call = of_all | {name: options[name] for name in ("num_splits",) if name in options}
        grown = dict(self.model)
        if counts is None or not (total or packed):
            tokens = ()
        else:
            for x in (q, k, v):
                x[len(x) - spare:] = torch.nan
            for sequence, *new in zip(sequences, k.split([*counts, spare]), v.split([*counts, spare]), strict=False):
                grown[sequence] = tuple(torch.cat(pair) for pair in zip(self.model[sequence], new, strict=True))
            tokens = (k, v) if packed else tuple(x.unflatten(0, (len(sequences), -1)) for x in (k, v))
        if packed:
            ends = torch.tensor([0, *queries]).cumsum(0)
            call["cu_seqlens_q"] = ends.to(torch.int32).to(DEVICE)
            if self.paged.device.type != "cpu" and tokens:
                call["check"] = True
        given = q if packed else q.unflatten(0, (len(sequences), -1)) if len(q) else q.new_empty(
            len(sequences), 0, self.heads, DIM)
        self.poison()
        expected = [last_rows(x, *grown[s], own)
                    for s, x, own in zip(sequences, q.split([*queries, spare]), of_each, strict=False)]
        before = self.held()
        try:
            results = [self.call(self.paged, sequences, given, tokens, call)]
        except tw.CacheFull:
            assert self.held() == before
            return
        results.append(self.call(self.flat, torch.tensor(sequences, device=DEVICE), given, tokens, call))
        self.model = grown
        for out, lse in results:
            if not packed:
                out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)
            for name, x, parts, rest, axis in (("out", out, expected, 0.0, 0), ("lse", lse, expected, -torch.inf, 1)):
                whole = torch.cat([pair[axis] for pair in parts], axis)
                found, others = x.split([sum(queries), spare], axis)
                torch.testing.assert_close(found, whole.float(), rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
                assert (others == rest).all()

    def call(self, cache, which, q, tokens, options):
        return tw.attention_with_kv_cache(q, cache, *tokens, cache_batch_idx=which, **options, return_lse=True,
                                          backend=self.backend)

    def poison(self):
        """Whatever no sequence holds is NaN."""
        used = torch.zeros(self.paged.k.shape[:2], dtype=torch.bool, device=DEVICE)
        rows = torch.arange(self.flat.capacity, device=DEVICE) - self.flat.left_padding[:, None]
        for sequence, (keys, _) in self.model.items():
            index = torch.arange(len(keys), device=DEVICE)
            used[self.paged.block_table[sequence, index // self.paged.page_size].long(), index % self.paged.page_size] = True
        for x in (self.paged.k, self.paged.v):
            x[~used] = torch.nan
        for x in (self.flat.k, self.flat.v):
            x[(rows < 0) | (rows >= self.flat.lengths[:, None])] = torch.nan

    def held(self):
        """All that must not change when an append fails."""
        book = self.paged.book
        memory = [x.nan_to_num(nan=9e9).tolist() for x in (self.paged.k, self.paged.v)]
        return (memory, self.paged.block_table.tolist(), self.paged.lengths.tolist(), sorted(book.free_pages),
                book.references.copy(), {s: p.copy() for s, p in book.pages.items()}, book.lengths.copy())

    @invariant()
    def lengths_are_the_models(self):
        lengths = [len(self.model[s][0]) if s in self.model else 0 for s in range(SLOTS)]
        assert self.paged.lengths.tolist() == lengths
        assert self.flat.lengths.tolist() == lengths
        assert self.paged.book.lengths == {s: lengths[s] for s in self.model}


@pytest.mark.parametrize("backend", [b for b in AVAILABLE if b != "reference"])
def test_any_order_of_calls(backend, poisoned, small_tiles):
    Caches.backend = backend
    fast = backend == "tiled"               # the interpreter would take minutes to shrink an example
    run_state_machine_as_test(Caches, settings=settings(
        max_examples=200 if fast else 12, stateful_step_count=10 if fast else 6, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate, Phase.shrink] if fast else [Phase.generate], suppress_health_check=list(HealthCheck)))


# ---- merges -------------------------------------------------------------------------------------------------------------

@st.composite
def merges(draw_from):
    """States over parts of the keys, some without keys for a row, and an order in which to merge pairs of them."""
    count, seed = draw_from(st.integers(1, 7)), draw_from(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(count, 3, 4, generator=generator) < draw_from(st.sampled_from([0.0, 0.3, 0.9]))
    lse = torch.randn(count, 3, 4, generator=generator, dtype=torch.float64) * draw_from(st.sampled_from([1.0, 60.0]))
    out = torch.randn(count, 3, 4, 5, generator=generator, dtype=torch.float64)
    out, lse = torch.where(hidden[..., None], 0.0, out), lse.masked_fill(hidden, -torch.inf)
    states = [AttentionState(*pair) for pair in zip(out, lse, strict=True)]
    return states, [draw_from(st.tuples(st.integers(0, 99), st.integers(0, 99))) for _ in range(count - 1)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(merges())
def test_any_order_of_merges(problem):
    states, order = problem
    lse = torch.stack([s.lse for s in states]).logsumexp(0)
    weights = torch.stack([(s.lse - lse).exp() for s in states]).nan_to_num()
    out = (weights[..., None] * torch.stack([s.out for s in states])).sum(0)
    merged = list(states)
    for i, j in order:
        one = merged.pop(i % len(merged))
        other = merged.pop(j % len(merged))
        merged.append(one.merge(other))
    for state in (*merged, merge_states(states)):
        torch.testing.assert_close(state.out, out, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(state.lse, lse, rtol=1e-13, atol=1e-13)
    single = [AttentionState(s.out.bfloat16(), s.lse.float()) for s in states]     # one rounding to bf16 in all, fp32 inside
    exact = (weights[..., None] * torch.stack([s.out for s in single]).double()).sum(0)
    torch.testing.assert_close(merge_states(single).out.double(), exact, rtol=2.0**-8, atol=1e-5)
