# SPDX-License-Identifier: Apache-2.0
"""An EAGLE head as the drafter: it reads the features of the level directly above and guesses what comes next."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from ..defaults import DEFAULT_TREE_DEPTH, DEFAULT_TREE_TOP_K
from ..eagle.configuration import LAST_HIDDEN_STATE
from ..eagle.features import select_features
from ..eagle.modeling import EagleHead
from ..errors import level_failures
from ..exactness.context import Context, Prompt
from ..exactness.distributions import LawMaker
from ..exactness.passes import Pass
from ..exactness.proposal import Proposal, TreeProposal
from ..exactness.row_tensors import picked
from ..exactness.tree_geometry import ROOT, depths
from .carried import CarriedSizes
from .draft_memory import DraftMemory
from .draft_vocabulary import WorkingVocabulary
from .drawn_tree import grow_drawn
from .eagle_memory import FeatureMemo, PairMemo, Pairs, left_mask, own_columns, padding_of
from .eagle_tree import Limits, first_in_race, grow
from .foreseen import PromptStates
from .guessing import Guesser
from .host_tree import grow_on_host
from .late_rows import aligned_laws, column_of
from .pointers import PointerMixture
from .sequential import SequentialDrafter
from .tree_size import TreeSize

_CHUNK = 1024
_UNREAD = 1024
"""Columns of the level above that are kept as it left them, which takes several times the memory of features."""
_LATEST = 32
"""Last ids of each row that join the working vocabulary in a round."""
_LIKELY = 16
"""Likeliest ids of the level above, where it drew its last token, that join too."""


class EagleDrafter(SequentialDrafter):
    """Drafts a chain of tokens with an EAGLE head (arXiv 2401.15077, arXiv 2503.01840).

    At position i the head reads the feature of the level above and the token at i + 1, and guesses the token at
    i + 2; its own output is the feature of the next step. Where the level above has not read the last tokens itself (a
    token the target added), the head goes on from its own output. Before the first pass above it proposes nothing.

    When a row of a chain stops is decided in `SequentialDrafter`, how large the tree of a row is in `TreeSize`, which
    ids are scored in `WorkingVocabulary`.

    Args:
        head: bound to the model of the level above.
        layers: the hidden states of that model that the head reads (`eagle.feature_layers`).
        name: shown in telemetry and errors.
        device: where laws are compared.
        draft_tokens: tokens a round (transformers' `num_assistant_tokens`).
        confidence_threshold: 0 to 1, 0 for never (transformers' `assistant_confidence_threshold`); a tree grows no
            further level once its likeliest path is less probable.
        schedule: see `SequentialDrafter`; "constant" keeps trees at their size, the others have `TreeSize` adapt them.
        eos: ids that end a text.
        tree_tokens, tree_depth, tree_top_k: size of the trees offered to a level that can check them; 0 tokens for
            none.
        draft_vocabulary: ids scored, see `WorkingVocabulary`.
        draft_temperature: see `SequentialDrafter`.
        memory: what is mixed into the head's guesses; None for the head alone.
        carried: see `SequentialDrafter`; trees begin as deep as those of the last generation ended, on average.
    """

    def __init__(
        self,
        head: EagleHead,
        layers: Sequence[int],
        *,
        name: str,
        device: torch.device,
        draft_tokens: int = 5,
        confidence_threshold: float = 0.0,
        schedule: str = "constant",
        eos: frozenset[int] = frozenset(),
        tree_tokens: int = 0,
        tree_depth: int = DEFAULT_TREE_DEPTH,
        tree_top_k: int = DEFAULT_TREE_TOP_K,
        draft_vocabulary: int | Literal["auto"] | None = None,
        draft_temperature: float = 1.0,
        memory: DraftMemory | None = None,
        carried: CarriedSizes | None = None,
    ) -> None:
        super().__init__(
            name=name,
            draft_tokens=draft_tokens,
            confidence_threshold=confidence_threshold,
            schedule=schedule,
            eos=eos,
            draft_temperature=draft_temperature,
            carried=carried,
        )
        self.head = head
        self.layers = list(layers)
        self.reads_layers = self.layers if memory is None else [*layers, LAST_HIDDEN_STATE]
        self.device = device
        self.tree_tokens = tree_tokens
        self.tree_depth = tree_depth
        self.tree_top_k = tree_top_k
        self.grows_trees = tree_tokens > 0
        self.draft_vocabulary = draft_vocabulary
        self.memory = memory
        self.chunk = _CHUNK
        self.features: list[FeatureMemo] = []
        self.pairs = PairMemo(head)
        self.working: WorkingVocabulary | None = None
        self._unread: list[tuple[Pass, torch.Tensor]] = []
        self._columns = 0  # of the passes in `_unread`
        self._sizes: list[TreeSize] = []
        self._shown: Pass | None = None  # the last pass above, for what it said
        self._chains: list[list[int]] = []  # drafted last
        self._samples: list[bool] = []
        self._likely: list[int] = []  # ids that join the working vocabulary at the next draft
        self._prompt: Prompt | None = None
        self._padding: list[int] = []
        self._prompt_states = PromptStates(0)

    def begin(self, index: int, batch: int, vocabulary: int) -> None:
        super().begin(index, batch, vocabulary)
        self.working = WorkingVocabulary(self.head, vocabulary, self.device, self.draft_vocabulary, sorted(self.eos))
        if self.working.note:
            self.stats.notes.append(self.working.note)
        self._forget(batch)

    def end(self) -> None:
        super().end()
        if self.carried is not None and self.schedule == "heuristic" and self._sizes:
            self.carried.depth = round(sum(size.depth for size in self._sizes) / len(self._sizes))
        self._forget(0)
        self.working = None

    def watch(self, passed: Pass) -> None:
        # Fused when they are needed, or many: while the head is not asked, watching costs next to nothing.
        states = select_features(passed.output.hidden_states, self.layers)  # [B, F, n H]
        if self.memory is not None:
            self._prompt_states.keep(passed)
        self._unread.append((replace(passed, output=None), states))  # not what else it holds
        self._columns += passed.fed
        if self._columns >= _UNREAD:
            self._read()
        self._shown = passed

    def observe(self, drafted: list[int], accepted: list[int]) -> None:
        super().observe(drafted, accepted)
        chains = [chain[:count] for chain, count in zip(self._chains, drafted, strict=True)]
        paths = [list(range(kept)) for kept in accepted]
        self._notice(chains, [list(range(ROOT, len(chain) - 1)) for chain in chains], paths)

    def observe_tree(self, tree: TreeProposal, paths: list[list[int]]) -> None:
        self.stats.accepted += sum(len(path) for path in paths)
        if self.schedule != "constant":
            for size, parents, path in zip(self._sizes, tree.parents, paths, strict=True):
                size.observe(max(depths(parents), default=0), len(path))
        self._notice(tree.tokens, tree.parents, paths)

    def _read(self) -> None:
        """Store the features of all passes seen since the last time, fused at once."""
        unread, self._unread, self._columns = self._unread, [], 0
        if not unread:
            return
        with self.stats.timed():
            # Of every row what it was fed: one that has joined reads its prompt beside others' single columns.
            pieces = [piece for passed, states in unread for piece in own_columns(passed, states)]
            fused = self.head.fuse(torch.cat(pieces)[None])[0]  # [N, H]
            rows = iter(torch.split(fused, [len(piece) for piece in pieces]))
            for passed, _ in unread:
                for memo, ids in zip(self.features, passed.read, strict=True):
                    memo.store(ids, next(rows))

    def resize_trees(self, nodes: int) -> None:
        """Most nodes of the trees from the next round on."""
        self.tree_tokens = nodes
        for size in self._sizes:
            size.most_nodes = nodes

    def prefill(self, context: Context, chunk: int) -> None:
        self.chunk = chunk

    def keep_rows(self, rows: list[int]) -> None:
        self._read()
        self.features = [self.features[row] for row in rows]
        # A row that is wanted twice goes on with two sizes.
        self._sizes = [copy.copy(self._sizes[row]) for row in rows]
        self._shown, self._chains = None, [self._chains[row] for row in rows]
        self.pairs.keep_rows(rows)
        if self.memory is not None:
            self._prompt_states.keep_rows(rows)
            self.memory.keep_rows(rows)

    def add_rows(self, count: int) -> None:
        self._read()
        self.features = [*self.features, *(FeatureMemo() for _ in range(count))]
        self._sizes = [*self._sizes, *(self._new_size() for _ in range(count))]
        self._shown, self._chains = None, [*self._chains, *([] for _ in range(count))]
        self.pairs.add_rows(count)
        self._prompt_states.add_rows(count)
        if self.memory is not None:
            self.memory.add_rows(count)

    def propose(self, context: Context, limits: list[int], law: LawMaker) -> Proposal:
        rows = self._known_pairs(context)
        room = [min(limit, self.draft_tokens) if row.count else 0 for limit, row in zip(limits, rows, strict=True)]
        tokens, q = [list[int]() for _ in rows], None
        if any(room):
            with self.stats.timed():
                q = self._draft(context, rows, tokens, room, law)
        self.stats.drafted += sum(len(row) for row in tokens)
        self._chains, self._samples = tokens, law.samples(context.batch)
        return Proposal(tokens, q, [[self.index] * len(row) for row in tokens])

    def propose_tree(self, context: Context, limits: list[int], law: LawMaker) -> TreeProposal | None:
        if not self.grows_trees:
            return None
        rows = self._known_pairs(context)
        room = [
            min(limit, size.depth) if row.count else 0
            for limit, size, row in zip(limits, self._sizes, rows, strict=True)
        ]
        if not any(room):
            return None
        with self.stats.timed():
            tree = self._grow(context, rows, room, law)
        self._samples = law.samples(context.batch)
        for nodes, parents in zip(tree.tokens, tree.parents, strict=True):
            self.stats.record_tree(len(nodes), max(depths(parents), default=0))
        return tree

    def _forget(self, batch: int) -> None:
        self.features = [FeatureMemo() for _ in range(batch)]
        self.pairs = PairMemo(self.head)
        self._sizes = [self._new_size() for _ in range(batch)]
        self._shown, self._prompt, self._padding = None, None, []
        self._chains, self._likely, self._unread = [[] for _ in range(batch)], [], []
        self._columns, self._prompt_states = 0, PromptStates(batch)
        if self.memory is not None:
            self.memory.begin(batch)

    def _new_size(self) -> TreeSize:
        depth = None if self.carried is None else self.carried.depth
        return TreeSize(self.tree_depth, max(1, self.tree_tokens), depth)

    def _notice(self, tokens: list[list[int]], parents: list[list[int]], paths: list[list[int]]) -> None:
        """Learn from the last pass of the level above, which accepted these paths of these trees."""
        if self._shown is None or self.working is None:
            return
        shown, self._shown = self._shown, None
        if self.working.sliced:
            # the likeliest ids where it drew its last token
            at = picked(shown.given, [(b, path[-1] + 1 if path else 0) for b, path in enumerate(paths)])
            self._likely = at.topk(min(_LIKELY, at.shape[-1]), dim=-1).indices.flatten().tolist()
        if self.memory is not None:
            self.memory.learn(tokens, parents, paths, shown.given, self._samples)

    def _known_pairs(self, context: Context) -> list[Pairs]:
        """Per row, all pairs of this context whose features the level above has computed."""
        self._read()
        if context.prompt is not self._prompt:
            self._prompt, self._padding = context.prompt, padding_of(context)
            for ids in context.ids:
                self._working.pin(ids)
        self._working.see([*self._likely, *(token for ids in context.ids for token in ids[-_LATEST:])])
        self._likely = []
        if self.memory is not None:
            self._prompt_states.tell(self.memory.foreseen, self._working, self._padding)
        rows = []
        for ids, memo, padding in zip(context.ids, self.features, self._padding, strict=True):
            end = min(memo.known(ids), len(ids) - 1)
            rows.append(Pairs(ids, max(memo.begin, padding), end, padding, memo))
        self.stats.draft_vocabulary = self._working.size if self._working.sliced else None
        return rows

    def _draft(
        self, context: Context, rows: list[Pairs], tokens: list[list[int]], room: list[int], law: LawMaker
    ) -> torch.Tensor | None:
        """Fill `tokens`; returns q `[B, K, V]`, or None in the greedy limit.

        A row with tokens that the level above has not read (`late`) takes them in first, one a step, while other rows
        already draft: each step is one column for all rows.
        """
        hidden, pointed, working = self._catch_up(rows), self._pointed(rows), self._working
        guesser, late = Guesser(working, pointed), [row.late for row in rows]
        plainly = self.draws_likeliest(law)
        going = [places > 0 for places in room]
        laws: list[torch.Tensor | None] = []
        step = 0
        while any(going):
            drawing = [alive and step >= len(more) for alive, more in zip(going, late, strict=True)]
            if any(drawing):
                pointed.extend(tokens)
                if plainly:
                    self.take(guesser.first(hidden), tokens, drawing, going)
                else:
                    scores = working.spread(guesser.scores(hidden))
                    laws.append(self.draw(context, tokens, scores, drawing, going, law))
            elif not plainly:
                laws.append(None)
            for b, places in enumerate(room):
                going[b] = going[b] and len(tokens[b]) < places
            if any(going):
                column = [column_of(more, drawn, step) for more, drawn in zip(late, tokens, strict=True)]
                hidden = self._advance(rows, column, hidden, step)
            step += 1
        return aligned_laws(laws, [len(more) for more in late], tokens) if law.draws else None

    def _catch_up(self, rows: list[Pairs]) -> torch.Tensor:
        with level_failures(f"the forward pass of {self.name} failed"):
            hidden, passes = self.pairs.catch_up(rows, self.chunk)
        self.stats.forward_passes += passes
        return hidden

    def _grow(self, context: Context, rows: list[Pairs], room: list[int], law: LawMaker) -> TreeProposal:
        """Trees of the likeliest nodes, by the head's law or by that and plain generation's noise; where the verifier
        draws by itself, of nodes drawn."""
        hidden, seen = self._take_in(rows)
        first = torch.tensor([[max(0, len(row.ids) - 1 - row.padding)] for row in rows])
        total, working, pointed = [size.nodes for size in self._sizes], self._working, self._pointed(rows)
        guesser, ids = Guesser(working, pointed), working.target_ids
        limits: Limits = {"top_k": self.tree_top_k, "threshold": self.confidence_threshold, "ends": self.eos}
        depth = 0  # tokens between the context and what is asked for next

        def run(tokens: torch.Tensor, features: torch.Tensor, level: int, sees: torch.Tensor) -> torch.Tensor:
            nonlocal depth
            depth = level
            before = seen[:, None].expand(-1, tokens.shape[1], -1).to(sees.device)
            places = (first + level - 1).expand(-1, tokens.shape[1])
            return self._step(tokens, features, places, torch.cat([before, sees], dim=2)[:, None])

        def step_level(tokens: torch.Tensor, features: torch.Tensor, level: int, sees: torch.Tensor) -> torch.Tensor:
            pointed.descend(tokens, sees)
            return run(tokens, features, level, sees)

        def step_nodes(
            tokens: list[list[int]], above: list[list[int]], features: torch.Tensor, level: int, sees: torch.Tensor
        ) -> torch.Tensor:
            pointed.go_on(tokens, above)
            return run(torch.tensor(tokens), features, level, sees)

        def guess(states: torch.Tensor) -> torch.Tensor:
            return law.probabilities(law.tempered(law.proposal_scores(guesser.scores(states)), self.draft_temperature))

        def best(states: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
            if not law.do_sample:
                return guesser.likeliest(states, count)
            ahead = [[min(depth, deepest - 1)] for deepest in room]
            arrivals = law.race(guess(states), context, ahead, active, ids)
            return first_in_race(arrivals, ids, count)

        if not law.draws:
            active = [places > 0 for places in room]
            if hidden.device.type == self.device.type == "cpu":
                grown = grow_on_host(hidden, room, total, best, step_nodes, **limits)
            else:
                grown = grow(hidden, room, total, best, step_level, **limits)
            return TreeProposal(grown.tokens, grown.parents, [[self.index] * len(row) for row in grown.tokens])

        grown, drawn = grow_drawn(hidden, room, total, guess, ids, step_level, law.draw_distinct, **limits)
        q = drawn.laws.new_zeros(*drawn.laws.shape[:2], self.vocabulary)
        own = [[self.index] * len(row) for row in grown.tokens]
        return TreeProposal(grown.tokens, grown.parents, own, drawn.nodes, q.index_copy_(-1, ids, drawn.laws))

    def _pointed(self, rows: list[Pairs]) -> PointerMixture:
        texts = [row.ids[row.padding :] for row in rows]
        return PointerMixture([]) if self.memory is None else self.memory.follow(texts)

    def _take_in(self, rows: list[Pairs]) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's output after each context, `[B, 1, H]`, and which columns of its cache belong to it, `[B, S]`."""
        hidden = self._catch_up(rows)
        with level_failures(f"the forward pass of {self.name} failed"):
            hidden, seen, passes = self.pairs.take_in(hidden)
        self.stats.forward_passes += passes
        return hidden, seen

    def _step(
        self, tokens: torch.Tensor, features: torch.Tensor, places: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        with level_failures(f"the forward pass of {self.name} failed"):
            hidden = self.pairs.step(self.pairs.allowed(tokens), features, places, mask)
        self.stats.forward_passes += 1
        return hidden

    def _advance(self, rows: list[Pairs], column: list[int], hidden: torch.Tensor, step: int) -> torch.Tensor:
        """One step of guessing: `[B, 1, H]` of the next position from this one's and the token after it."""
        positions = torch.tensor([[max(0, row.end - row.padding) + step] for row in rows])
        mask = left_mask(self.pairs.unused, self.pairs.cache.length + 1)
        return self._step(torch.tensor(column)[:, None], hidden, positions, mask)

    @property
    def _working(self) -> WorkingVocabulary:
        assert self.working is not None, "begin() comes first"
        return self.working
