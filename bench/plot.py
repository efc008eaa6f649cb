def draw(runs, folder):
    return []
