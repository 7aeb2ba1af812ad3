//! The wire contract of Terrace, and every pure rule that both ends must compute alike.
