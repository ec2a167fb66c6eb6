"""What a mixture reads, as text."""

from ring_train.data.mixture import Mixture


def mixture_table(mixture: Mixture) -> str:
    """Return a line per phase and domain: tokens, share of the phase, passes over the domain."""
    end = sum(phase.num_samples for phase in mixture.phases)
    tokens = mixture.tokens_before(end)
    rows = [("phase", "domain", "tokens", "share of rows", "epochs read by its end")]
    for number, phase in enumerate(mixture.phases):
        total = sum(phase.shares.values())
        for domain, name in enumerate(mixture.domains):
            if not phase.shares[name]:
                continue
            epochs = mixture.starts[number + 1, domain] / mixture.streams[name].epoch_length
            share = phase.shares[name] / total
            count = f"{int(tokens[number, domain]):,}"
            rows.append((phase.name, name, count, f"{share:.4%}", f"{epochs:.3f}"))
    rows += [("-", name, "0", "not read", "") for name in sorted(not_read(mixture))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join(
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        + "\n"
        for row in rows
    )


def not_read(mixture: Mixture) -> set[str]:
    """Return the domains that no phase reads."""
    return set(mixture.domains) - {
        name for phase in mixture.phases for name, share in phase.shares.items() if share
    }
