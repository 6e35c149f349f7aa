"""Defenses by name."""

DEFENSES_REGISTRY = {}


def register_defense(name, config_cls):
    """Enters a class with its configuration's."""

    def enter(defense_cls):
        DEFENSES_REGISTRY[name] = (config_cls, defense_cls)
        return defense_cls

    return enter
