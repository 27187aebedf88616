"""An audit as `Audit.to_dict()` gives it, made by hand: what the page and the command line are tested on."""

from __future__ import annotations

from typing import Any


def symmetry(
    name: str, where: str, group: str, dim: int, kind: str, parameters: list[str], residual: float = 3e-15, **more: Any
) -> dict[str, Any]:
    """One ``Symmetry.to_dict()``; its name ends with its place."""
    return {
        "name": f"{name}: {where}",
        "group": group,
        "dim": dim,
        "order": 0,
        "kind": kind,
        "parameters": parameters,
        "level": "function",
        "residual": residual,
        "certified": residual < 1e-10,
        "where": where,
        "note": "",
        "fixed_set": None,
        **more,
    }


def audit_of_gpt(layers: int = 3, width: int = 64, complete: bool = True) -> dict[str, Any]:
    """The audit of a GPT with ``layers`` layers; with ``complete`` False, some things are left open."""
    found: list[dict[str, Any]] = [
        symmetry(
            "position and token shift",
            "transformer",
            f"R^{width}",
            width,
            "translation",
            ["transformer.wte.weight", "transformer.wpe.weight"],
        ),
        symmetry("rotation of the stream", "transformer", f"O({width - 1})", 3, "linear", ["transformer.wte.weight"], 8e-14),
    ]
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []
    collapse: list[dict[str, Any]] = []

    def node(
        label: str,
        op: str,
        where: str,
        inputs: list[str],
        space: str = f"D={width}",
        group: str = f"O({width - 1})",
        params: tuple[str, ...] = (),
    ) -> str:
        name = f"n{len(nodes)}"
        nodes.append({"id": name, "label": label, "op": op, "where": where, "params": [f"{where}.{param}" for param in params]})
        for source in inputs:
            edges.append({"source": source, "target": name, "space": space, "size": int(space.split("=")[1]), "group": group})
        return name

    stream = node("wte", "embedding", "transformer.wte", [], params=("weight",))
    positions = node("wpe", "embedding", "transformer.wpe", [], params=("weight",))
    stream = node("add", "add", "transformer", [stream, positions])
    for index in range(layers):
        at = f"transformer.h.{index}"
        attn, mlp = f"{at}.attn", f"{at}.mlp"
        norm = node("ln_1", "layer_norm", f"{at}.ln_1", [stream], params=("weight", "bias"))
        heads = [node(part, "linear", f"{attn}.{part}", [norm], params=("weight", "bias")) for part in ("q", "k", "v")]
        scores = node("softmax(QK)", "softmax", attn, heads[:2], "d_head=16", "GL(16)")
        mixed = node("scores · V", "matmul", attn, [scores, heads[2]], "d_head=16", "GL(16)")
        out = node("c_proj", "linear", f"{attn}.c_proj", [mixed], "d_head=16", "GL(16)", params=("weight", "bias"))
        stream = node("add", "add", at, [stream, out])
        norm = node("ln_2", "layer_norm", f"{at}.ln_2", [stream], params=("weight", "bias"))
        hidden = node("c_fc", "linear", f"{mlp}.c_fc", [norm], params=("weight", "bias"))
        hidden = node("relu", "relu", f"{mlp}.act", [hidden], f"hidden={4 * width}", f"R+ wr S_{4 * width}")
        out = node("c_proj", "linear", f"{mlp}.c_proj", [hidden], f"hidden={4 * width}", f"R+ wr S_{4 * width}", params=("weight", "bias"))
        stream = node("add", "add", at, [stream, out])
        found += [
            symmetry("QK GL(16) per head", attn, "GL(16)^4", 1024, "linear", [f"{attn}.q.weight", f"{attn}.k.weight"], 2e-14 * (index + 1)),
            symmetry("OV GL(16) per head", attn, "GL(16)^4", 1024, "linear", [f"{attn}.v.weight", f"{attn}.c_proj.weight"], 5e-15),
            symmetry("key bias", attn, f"R^{width}", width, "pure", [f"{attn}.k.bias"], 0.0, note="softmax does not see it"),
            symmetry("heads permute", attn, "S_4", 0, "discrete", [f"{attn}.q.weight"], 4e-16, order=3, fixed_set="two heads are equal"),
            symmetry(
                "rescaling of units",
                mlp,
                f"R+^{4 * width}",
                4 * width,
                "diagonal",
                [f"{mlp}.c_fc.weight", f"{mlp}.c_fc.bias", f"{mlp}.c_proj.weight"],
                7e-16,
                fixed_set="unit j is zero",
            ),
            symmetry("units permute", mlp, f"S_{4 * width}", 0, "discrete", [f"{mlp}.c_fc.weight"], 1e-16, order=4 * width - 1),
        ]
        if index % 2 == 0:
            collapse.append(
                {
                    "symmetry": f"rescaling of units: {mlp}",
                    "where": mlp,
                    "kind": "dead",
                    "count": 3 + index,
                    "of": 4 * width,
                    "units": [1, 5, 9],
                    "distance": None,
                    "parameters_lost": 96,
                    "removable": True,
                    "digits": 15.2,
                    "note": "never active on 128 samples",
                }
            )
        if index % 3 == 1:
            collapse.append(
                {
                    "symmetry": None,
                    "where": mlp,
                    "kind": "duplicate",
                    "count": 2,
                    "of": 4 * width,
                    "units": [7, 8],
                    "distance": [1e-9, 1e-9],
                    "parameters_lost": 64,
                    "removable": True,
                    "digits": None,
                    "note": "",
                }
            )
    final = node("ln_f", "layer_norm", "transformer.ln_f", [stream], params=("weight", "bias"))
    node("lm_head", "linear", "lm_head", [final], params=("weight",))
    found.append(
        symmetry(
            "final norm into head", "transformer.ln_f", f"R+^{width}", width, "affine", ["transformer.ln_f.weight", "lm_head.weight"], 6e-16
        )
    )
    found.append(
        symmetry(
            "dead unit 5",
            "transformer.h.0.mlp",
            "R^65",
            65,
            "point",
            ["transformer.h.0.mlp.c_fc.weight"],
            0.0,
            note="unit 5 is never active",
        )
    )
    nullity = sum(item["dim"] for item in found) - 1
    open_ends = {
        "refuted": [{"name": "sign flips of q", "why": "outputs changed by 0.12", "parameters": ["transformer.h.0.attn.q.weight"]}],
        "undecided": [
            {
                "name": "transformer.h.1.mlp.act",
                "why": "the operator has no derivative",
                "parameters": ["transformer.h.1.mlp.c_fc.weight"],
                "dim": 4,
            }
        ],
    }
    return {
        "schema": 1,
        "parasym": "0.1.0",
        "model": {
            "name": "GPT2LMHeadModel",
            "parameters": 210_432,
            "tensors": 4 + 16 * layers,
            "trace": "export",
            "mode": "eval",
            "seed": 0,
            "inputs": "128 samples in 4 batches",
            "twin": "widths 64 -> 6, 256 -> 9; 2 heads of 3",
        },
        "symmetries": found,
        **(open_ends if not complete else {"refuted": [], "undecided": []}),
        "approximate": [
            {"name": "scale of the stream", "ratio": 3.1e-6, "dim": 1, "parameters": ["transformer.wte.weight"], "why": "eps of the norms"}
        ],
        "completeness": {
            "parameters": 210_432,
            "rank": 210_432 - nullity,
            "nullity": nullity,
            "explained": 1.0 if complete else 1 - 4 / nullity,
            "exact": True,
            "method": "SVD of the Jacobian (210,432 columns)",
            "gap": [2.1e-7, 3e-16],
        },
        "classified": {"symmetric": 180_000, "rigid": 30_432 - (0 if complete else 400), "undecided": 0 if complete else 400},
        "collapse": collapse,
        "advice": [
            {
                "severity": "high",
                "where": "transformer.h.0.mlp",
                "what": "3 of 256 units are dead",
                "why": "They never fire, and no gradient reaches them.",
                "command": "parasym fix revive --where transformer.h.0.mlp",
                "method": "revive",
                "training": "parasym.methods.syre(model)",
            },
            {
                "severity": "medium",
                "where": "transformer.h.1.mlp",
                "what": "2 units are copies of each other",
                "why": "They stay equal for ever under SGD.",
                "command": "",
                "method": "",
                "training": "parasym.methods.syre(model, metric='random')",
            },
            {
                "severity": "info",
                "where": "",
                "what": "The key biases do nothing",
                "why": "Softmax does not see them.",
                "command": "",
                "method": "",
                "training": "",
            },
        ],
        "graph": {"nodes": nodes, "edges": edges},
    }
