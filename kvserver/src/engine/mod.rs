//! Where every block is: index, leases, budgets and policy.
