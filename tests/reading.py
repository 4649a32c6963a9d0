"""Runs a rule outside the loop, on tiny batches, and tells from the bits of the outcome what it has read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from tiny import CLASSES, make_batch

RETAIN, FORGET = make_batch(9, seed=0), make_batch(5, seed=1, labels=0)
READABLE = ("retain images", "retain labels", "forget images", "forget labels")


def prepared(rule, params, state, retain=RETAIN, forget=FORGET):
    """(params, state) before the first step: what `prepare` makes of a batch of each set, then each pass of one."""
    sets = {"retain": retain, "forget": forget, "all": jax.tree.map(lambda *x: jnp.concatenate(x), retain, forget)}
    if rule.prepare is not None:
        params, state = rule.prepare(params, state, [retain], [forget])
    for one in rule.passes:
        counted = state._replace(step=jnp.int32(1))
        carry = jax.jit(one.step)(params, state, jax.jit(one.init)(params, state), sets[one.over])
        params, state = jax.jit(one.finish)(params, counted, carry)
        state = state._replace(step=jnp.int32(0))
    return params, state


def variants(retain=RETAIN, forget=FORGET):
    """{what is another: (retain, forget)}."""
    other = {"retain": make_batch(9, seed=10), "forget": make_batch(5, seed=11, labels=0)}
    found = {}
    for name in READABLE:
        kind, part = name.split()
        batches = {"retain": retain, "forget": forget}
        images, labels = other[kind].images, (batches[kind].labels + 1) % CLASSES
        change = {"images": images} if part == "images" else {"labels": labels}
        found[name] = tuple((batches | {kind: dataclasses.replace(batches[kind], **change)}).values())
    return found


def read_by(rule, params, batch_stats, epochs):
    """Which of `READABLE` a rule reads: another one gives other bits, after a step of every epoch."""
    step = jax.jit(rule.step) if rule.step else None

    def outcome(retain, forget):
        state = rule.init(params, batch_stats, jax.random.key(3))
        after, state = prepared(rule, params, state, retain, forget)
        for epoch in range(epochs if step else 0):
            state = state._replace(step=jnp.int32(epoch), epoch=jnp.int32(epoch))
            after, state, _ = step(after, state, retain, forget)
        return [np.asarray(x) for x in jax.tree.leaves((after, state.batch_stats, state.opt_state, state.extra))]

    plain = outcome(RETAIN, FORGET)
    return {
        name
        for name, batches in variants().items()
        if any((a != b).any() for a, b in zip(plain, outcome(*batches), strict=True))
    }


def declared(reads):
    """({of `READABLE`}, {sets that passes go over}) of what a rule says: "retain, forget images, a pass over all"."""
    terms = [] if reads == "nothing" else reads.split(", ")
    parts, passes = set(), set()
    for term in terms:
        name = term.removeprefix("a pass over ")
        kind, _, part = name.partition(" ")
        passes |= {kind} if name != term else set()
        for one in ("retain", "forget") if kind == "all" else (kind,):
            parts |= {f"{one} images"} | ({f"{one} labels"} if part != "images" else set())
    return parts, passes
