"""What is claimed of the rows of an encoder."""

from evaluation import sentence_embeddings


def row(wiki: float, bits: float = 3.3, **more) -> dict:
    cosines = {"wiki": {"mean": wiki, "worst": wiki - 0.1}}
    return {"cosines": cosines, "body_bits_per_weight": bits, "seconds": 1.0, "commit": "c0ffee", "machine": "one", **more}


def test_better_methods_come_before_worse_ones_and_controls():
    rows = {
        "codebook-3bit": row(0.97), "jlcm-3bit": row(0.98), "jlcm-3bit, codes not learned": row(0.99),
        "planned, 3.3 bits": row(0.98, 3.29, target=3.3), "planned, 2 bits": row(0.9, 2.01, target=2.0),
    }  # fmt: skip
    bars = [(bar["claim"], bar["target"], bar["measured"], bar["held"]) for bar in sentence_embeddings.bars(rows)]
    assert bars == [
        ("jlcm-3bit: mean cosine on wiki, above that of codebook-3bit", "> 0.9700", 0.98, True),
        ("jlcm-3bit: mean cosine on wiki, above that of jlcm-3bit, codes not learned", "> 0.9900", 0.98, False),
        ("planned, 3.3 bits: bits, share of the target", "in [0.995, 1]", 0.997, True),
        ("planned, 2 bits: bits, share of the target", "in [0.995, 1]", 1.005, False),
    ]
