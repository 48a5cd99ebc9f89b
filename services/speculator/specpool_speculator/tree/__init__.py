"""The draft tree of one sequence: tokens in flight, guesses about their verification, and the branches behind them."""
