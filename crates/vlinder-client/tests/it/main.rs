//! The client against services that misbehave on purpose.

mod calls;
mod fake;
mod turns;
