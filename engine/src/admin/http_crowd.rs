//! Who of many HTTP connections makes room for the next.
//!
//! A connection is dismissed that is idle between requests, or else has not asked in full or does not take its answer;
//! of several, the one that has stood so for longest, so that a new one has its time to ask whatever the others do. One
//! whose request is being served never is. Where nobody can be dismissed, the first that comes to stand so is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::sync::OwnedSemaphorePermit;

/// The connections that have a place.
#[derive(Debug, Default)]
pub(super) struct Crowd(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    members: HashMap<u64, Member>,
    /// Counts who entered and whose standing changed.
    count: u64,
    /// Somebody waits for a place, and nobody could be dismissed.
    is_short: bool,
}

#[derive(Debug)]
struct Member {
    standing: Standing,
    since: u64,
    is_dismissed: bool,
    waker: Option<Waker>,
}

/// Worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// It has had an answer.
    Idle,
    /// It has not asked in full, or takes nothing of its answer.
    Slow,
    Served,
}

/// One connection's; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    seat: Seat,
    _permit: OwnedSemaphorePermit,
}

/// For whoever serves the connection's requests.
#[derive(Debug, Clone)]
pub(super) struct Seat {
    crowd: Arc<Crowd>,
    member: u64,
}

impl Crowd {
    pub(super) fn enter(this: &Arc<Self>, permit: OwnedSemaphorePermit) -> Place {
        let mut state = this.state();
        state.is_short = false;
        state.count += 1;
        let member = state.count;
        let entered = Member { standing: Standing::Slow, since: member, is_dismissed: false, waker: None };
        state.members.insert(member, entered);
        drop(state);
        Place { seat: Seat { crowd: Arc::clone(this), member }, _permit: permit }
    }

    /// Somebody waits for a place.
    pub(super) fn dismiss_one(&self) {
        self.state().dismiss_one();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn dismiss_one(&mut self) {
        let may_go = |member: &&mut Member| !member.is_dismissed && member.standing != Standing::Served;
        let worst = self.members.values_mut().filter(may_go).min_by_key(|member| (member.standing, member.since));
        self.is_short = worst.is_none();
        if let Some(member) = worst {
            member.is_dismissed = true;
            if let Some(waker) = member.waker.take() {
                waker.wake();
            }
        }
    }

    fn stand(&mut self, member: u64, standing: Standing) {
        self.count += 1;
        let since = self.count;
        let Some(member) = self.members.get_mut(&member) else { return };
        if member.standing == standing {
            return;
        }
        (member.standing, member.since) = (standing, since);
        // Its request came just in time: another one goes.
        let is_missed = standing == Standing::Served && std::mem::take(&mut member.is_dismissed);
        if is_missed || self.is_short {
            self.dismiss_one();
        }
    }
}

impl Seat {
    /// Its request has come, and is being served from now on.
    pub(super) fn serve(&self) {
        self.crowd.state().stand(self.member, Standing::Served);
    }
}

impl Place {
    pub(super) fn seat(&self) -> Seat {
        self.seat.clone()
    }

    pub(super) fn stand(&self, standing: Standing) {
        self.seat.crowd.state().stand(self.seat.member, standing);
    }

    /// Whether it is to make room; wakes the task once it is.
    pub(super) fn poll_dismissed(&self, context: &Context<'_>) -> Poll<()> {
        let mut state = self.seat.crowd.state();
        let Some(member) = state.members.get_mut(&self.seat.member) else { return Poll::Pending };
        if member.is_dismissed {
            return Poll::Ready(());
        }
        member.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.seat.crowd.state().members.remove(&self.seat.member);
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Semaphore;

    use super::*;

    fn crowd(standings: &[Standing]) -> (Arc<Crowd>, Vec<Place>) {
        let (crowd, places) = (Arc::new(Crowd::default()), Arc::new(Semaphore::new(standings.len())));
        let enter = |standing: &Standing| {
            let place = Crowd::enter(&crowd, Arc::clone(&places).try_acquire_owned().unwrap());
            place.stand(*standing);
            place
        };
        let entered = standings.iter().map(enter).collect();
        (crowd, entered)
    }

    fn dismissed(places: &[Place]) -> Vec<usize> {
        let context = Context::from_waker(Waker::noop());
        (0..places.len()).filter(|number| places[*number].poll_dismissed(&context).is_ready()).collect()
    }

    #[test]
    fn who_stands_worst_for_longest_goes_first_and_who_is_served_stays() {
        use Standing::{Idle, Served, Slow};
        let (crowd, places) = crowd(&[Served, Slow, Idle, Slow, Idle, Slow]);
        let order: Vec<usize> = (0..6)
            .flat_map(|_| {
                let before = dismissed(&places);
                crowd.dismiss_one();
                dismissed(&places).into_iter().filter(move |number| !before.contains(number))
            })
            .collect();
        assert_eq!(order, [2, 4, 1, 3, 5]);
        // The sixth found nobody.
        places[0].stand(Idle);
        assert_eq!(dismissed(&places), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn whose_request_comes_just_in_time_is_served_and_another_goes() {
        let (crowd, places) = crowd(&[Standing::Idle, Standing::Slow]);
        crowd.dismiss_one();
        assert_eq!(dismissed(&places), [0]);
        places[0].stand(Standing::Slow);
        places[0].seat().serve();
        assert_eq!(dismissed(&places), [1]);
    }

    #[test]
    fn a_want_is_over_with_the_next_place() {
        let (crowd, mut places) = crowd(&[Standing::Served]);
        crowd.dismiss_one();
        places.clear();
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let place = Crowd::enter(&crowd, permit);
        place.stand(Standing::Slow);
        assert_eq!(dismissed(&[place]), [0; 0]);
    }
}
