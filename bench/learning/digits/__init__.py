"""The suite "digits": scikit-learn's digits, split by class or permuted, learnt by a small multilayer perceptron."""
