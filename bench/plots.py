def draw(rows, output, limits):
    pass
