//! Integration tests: real daemons, real servers, real agents, and whatever kills them.

mod support;

mod access;
mod agents;
mod chaos;
mod cluster;
mod compose;
mod configuration;
mod console;
mod container;
mod conversation;
mod counts;
mod delegation;
mod doctor;
mod full;
mod gateway;
mod reload;
mod replay;
mod restarts;
mod rollback;
mod rubbish;
mod scaffolds;
mod secrets;
mod start;
mod stop;
mod stores;
mod turns;
