//! The contract of the bus. Every test holds for every backend; each list below names a backend and
//! the tests it takes. A missing `nats-server` is a failure that says how to get one.
//!
//! What only one backend can show (unfit servers, lost answers, restored stores) is in `nats_only`.

mod blob;
mod dead;
mod fixture;
mod heal;
mod kv;
mod log;
mod nats_only;
mod outage;
mod queue;
mod race;
mod signal;
mod support;

macro_rules! tests {
    ($fixture:ty: $($module:ident :: { $($name:ident),* $(,)? }),* $(,)?) => {
        $(
            mod $module {
                $(
                    #[tokio::test]
                    async fn $name() {
                        crate::$module::$name::<$fixture>().await;
                    }
                )*
            }
        )*
    };
}

/// Everything.
macro_rules! whole_contract {
    ($name:ident, $fixture:ty) => {
        mod $name {
            tests! { $fixture:
                log::{
                    what_was_appended_is_read_back,
                    the_last_match_of_a_wildcard_is_found_at_once,
                    a_known_id_is_swallowed_and_a_repeat_is_not,
                    an_expectation_holds_or_nothing_is_stored,
                    ranges_are_complete_and_in_order,
                    following_has_no_gap_and_no_repeat,
                    a_slow_follower_misses_nothing,
                    seen_is_in_force_when_it_returns,
                    a_waiter_sees_only_what_was_stored,
                    a_full_log_refuses_and_recovers,
                    many_subjects,
                    hostile_appends_are_refused,
                    missing_streams_are_errors,
                },
                race::{
                    one_of_several_appenders_wins,
                    two_results_race_and_all_readers_agree,
                    the_first_end_wins_and_waiters_never_see_a_loser,
                    a_retry_of_a_success_is_a_success,
                },
                queue::{
                    acknowledged_work_is_done,
                    unacknowledged_work_comes_back,
                    progress_keeps_work,
                    work_is_handed_back_by_token_at_once,
                    a_delayed_hand_back_waits,
                    terminated_work_never_comes_back,
                    a_late_acknowledgement_still_counts,
                    workers_share_a_queue,
                    a_late_queue_does_not_replay,
                    a_queue_keeps_its_position,
                    a_missing_queue_says_so,
                    no_more_than_asked_for,
                    an_abandoned_call_loses_nothing,
                    stopping_hands_back_at_once,
                    dropping_hands_back_at_once,
                    queues_tell_how_full_they_are,
                    hostile_tokens_are_refused,
                },
                dead::{
                    dead_letters_are_kept_and_driven_again,
                    a_dropped_delivery_goes_to_another_worker,
                },
                kv::{
                    entries_are_written_under_expectations,
                    one_of_several_creators_wins,
                    entries_vanish_and_watchers_hear_of_it,
                    a_renewed_entry_stays,
                    a_watch_tells_everything_then_changes,
                    hostile_keys_are_refused,
                },
                blob::{
                    blobs_come_back_equal,
                    putting_twice_at_once_is_fine,
                    bad_blobs_are_refused,
                },
                signal::{
                    signals_reach_who_listens,
                    a_slow_listener_loses_the_oldest,
                },
                heal::{
                    what_was_lost_is_given_back_once_and_counts_where_it_was,
                    another_healer_goes_on_where_one_died,
                    a_lost_turn_does_not_take_its_place_back,
                },
                outage::{
                    everything_resumes_after_a_kill,
                    who_waits_is_told_when_something_may_have_been_missed,
                    a_killed_holders_work_can_be_acknowledged_after_the_restart,
                },
            }
        }
    };
}

/// What replicas and a change of leader could break.
macro_rules! cluster_contract {
    ($name:ident, $fixture:ty) => {
        mod $name {
            tests! { $fixture:
                log::{
                    what_was_appended_is_read_back,
                    the_last_match_of_a_wildcard_is_found_at_once,
                    a_known_id_is_swallowed_and_a_repeat_is_not,
                    an_expectation_holds_or_nothing_is_stored,
                    ranges_are_complete_and_in_order,
                    following_has_no_gap_and_no_repeat,
                    seen_is_in_force_when_it_returns,
                    a_waiter_sees_only_what_was_stored,
                },
                race::{
                    one_of_several_appenders_wins,
                    two_results_race_and_all_readers_agree,
                    the_first_end_wins_and_waiters_never_see_a_loser,
                    a_retry_of_a_success_is_a_success,
                },
                queue::{
                    unacknowledged_work_comes_back,
                    work_is_handed_back_by_token_at_once,
                    workers_share_a_queue,
                },
                kv::{
                    entries_are_written_under_expectations,
                    one_of_several_creators_wins,
                    entries_vanish_and_watchers_hear_of_it,
                },
                blob::{
                    blobs_come_back_equal,
                },
                heal::{
                    what_was_lost_is_given_back_once_and_counts_where_it_was,
                },
                outage::{
                    everything_resumes_after_a_kill,
                },
            }
        }
    };
}

whole_contract!(nats_2_11, crate::fixture::NatsOldest);
whole_contract!(nats_current, crate::fixture::NatsCurrent);
cluster_contract!(nats_cluster, crate::fixture::NatsReplicated);
whole_contract!(local, crate::fixture::Local);
